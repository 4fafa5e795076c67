//! Messages on their way in: prepare and publish. Deciding about them is in [`super::decisions`].

use std::collections::HashMap;
use std::time::Duration;

use super::bodies;
use super::decisions::{confirmed, conflict, moves};
use super::lists;
use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::{Effect, MessageEvent, MessageId, MessageState, NewMessage, Timestamp};
use crate::store::{DecidedBy, Error, Refusal, Written};

/// What a verb needs to know of a stored message.
pub(super) struct Stored {
    pub(super) producer: String,
    pub(super) topic: String,
    pub(super) state: MessageState,
    pub(super) content_hash: Vec<u8>,
}

pub(super) async fn prepare(
    tx: &mut Tx,
    (messages, check_after): &(Vec<NewMessage>, Duration),
) -> Result<Written, Error> {
    let check_at = tx.now.after(*check_after);
    let doing = Kind::Prepare.doing();
    hand_over(tx, messages, MessageEvent::Prepare, Some(check_at), doing).await
}

pub(super) async fn publish(
    tx: &mut Tx,
    (messages,): &(Vec<NewMessage>,),
) -> Result<Written, Error> {
    let doing = Kind::Publish.doing();
    hand_over(tx, messages, MessageEvent::Publish, None, doing).await
}

/// Stores messages: PREPARED if they are to be checked, else CONFIRMED.
async fn hand_over(
    tx: &mut Tx,
    messages: &[NewMessage],
    event: MessageEvent,
    check_at: Option<Timestamp>,
    doing: &'static str,
) -> Result<Written, Error> {
    let bucket = bodies::current(&mut tx.db, tx.now)
        .await
        .map_err(error(doing))?;
    let mut written = Written::default();
    for part in lists::parts(messages, names) {
        let mut stored = stored(tx, part.iter().map(|message| message.id), doing).await?;
        let holders = holders(tx, part, doing).await?;
        let (mut new, mut moved) = (Vec::new(), Vec::new());
        for message in part {
            let stored = stored.remove(&message.id);
            let holder = key(message).and_then(|key| holders.get(&key.map(str::to_owned)));
            let item = match handed_over(tx, message, stored, holder.copied(), event, doing).await?
            {
                HandedOver::New => {
                    new.push(message);
                    Ok(match check_at {
                        Some(_) => MessageState::Prepared,
                        None => MessageState::Confirmed,
                    })
                }
                HandedOver::Again(state) => Ok(state),
                HandedOver::Moves(_, _) if event == MessageEvent::Prepare => {
                    return Err(Error::Inconsistent {
                        doing,
                        what: format!("a prepare would move message {}", message.id),
                    });
                }
                HandedOver::Moves(stored, next) => {
                    moved.push((message.id, stored, next));
                    Ok(next)
                }
                HandedOver::Refused(refusal) => Err(refusal),
            };
            written.items.push(item);
        }
        insert(tx, &new, bucket, check_at, doing).await?;
        if check_at.is_none() && !new.is_empty() {
            confirmed(tx, &lists::ids(new.iter().map(|message| message.id)), doing).await?;
            let topics = new.iter().map(|message| message.topic.clone());
            written.topics.extend(topics);
        }
        moves(tx, moved, DecidedBy::Producer, doing, &mut written.topics).await?;
    }
    Ok(written)
}

/// A key belongs to producer and topic.
type Key<T> = [T; 3];

fn key(message: &NewMessage) -> Option<Key<&str>> {
    let key = message.key.as_deref()?;
    Some([&message.producer, &message.topic, key])
}

/// What a message must not share with another one for both to be looked up at the same time.
#[derive(PartialEq, Eq, Hash)]
enum Name<'m> {
    Id(MessageId),
    Key(Key<&'m str>),
}

fn names(message: &NewMessage) -> impl Iterator<Item = Name<'_>> {
    let key = key(message).map(Name::Key);
    std::iter::once(Name::Id(message.id)).chain(key)
}

enum HandedOver {
    New,
    Again(MessageState),
    Moves(Stored, MessageState),
    Refused(Refusal),
}

/// What handing this message over means, given what is stored under its id and who holds its key.
async fn handed_over(
    tx: &mut Tx,
    message: &NewMessage,
    stored: Option<Stored>,
    holder: Option<(MessageId, MessageState)>,
    event: MessageEvent,
    doing: &'static str,
) -> Result<HandedOver, Error> {
    let id = message.id;
    if let Some(stored) = stored {
        if stored.producer != message.producer {
            return Ok(HandedOver::Refused(Refusal::IdTaken(id)));
        }
        if stored.content_hash != message.content_hash().as_bytes() {
            let state = stored.state;
            return Ok(HandedOver::Refused(Refusal::OtherContent { id, state }));
        }
        return Ok(match stored.state.apply(event) {
            Ok(Effect::AlreadySo) => HandedOver::Again(stored.state),
            Ok(Effect::Moves(next)) => HandedOver::Moves(stored, next),
            Err(wrong) => {
                if wrong.is_conflict() {
                    conflict(tx, id, &wrong.to_string(), doing).await?;
                }
                HandedOver::Refused(Refusal::WrongState { id, wrong })
            }
        });
    }
    let Some((holder, state)) = holder else {
        return Ok(HandedOver::New);
    };
    if state == MessageState::Prepared {
        // A crashed try must not hold the key for long: ask about it now, unless it is being
        // asked about.
        sqlx::query(
            "-- check the holder now
             UPDATE message SET check_at = min(check_at, ?)
              WHERE id = ? AND state = 'PREPARED' AND check_token IS NULL",
        )
        .bind(tx.now.as_micros())
        .bind(&holder.as_bytes()[..])
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    }
    Ok(HandedOver::Refused(Refusal::KeyHeld { holder, state }))
}

/// Who holds the keys of these messages.
async fn holders(
    tx: &mut Tx,
    messages: &[NewMessage],
    doing: &'static str,
) -> Result<HashMap<Key<String>, (MessageId, MessageState)>, Error> {
    let keys: Vec<_> = messages.iter().filter_map(key).collect();
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query(
        "-- who holds the keys
         SELECT m.id, m.producer, m.topic, m.key, m.state
           FROM json_each(?1) k
                CROSS JOIN message m ON m.producer = k.value ->> 0 AND m.topic = k.value ->> 1
                                    AND m.key = k.value ->> 2 AND m.key IS NOT NULL
                                    AND m.state <> 'CANCELLED'",
    )
    .bind(lists::rows(&keys).map_err(error(doing))?)
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    rows.iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            let key = [
                columns.get("producer")?,
                columns.get("topic")?,
                columns.get("key")?,
            ];
            Ok((key, (columns.id("id")?, state(&columns)?)))
        })
        .collect()
}

/// Reads what is stored under these ids, whoever's it is.
pub(super) async fn stored(
    tx: &mut Tx,
    ids: impl IntoIterator<Item = MessageId>,
    doing: &'static str,
) -> Result<HashMap<MessageId, Stored>, Error> {
    let rows = sqlx::query(
        "-- what is stored
         SELECT m.id, m.producer, m.topic, m.state, m.content_hash
           FROM json_each(?1) CROSS JOIN message m ON m.id = unhex(value)",
    )
    .bind(lists::ids(ids))
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    rows.iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            let stored = Stored {
                producer: columns.get("producer")?,
                topic: columns.get("topic")?,
                state: state(&columns)?,
                content_hash: columns.get("content_hash")?,
            };
            Ok((columns.id("id")?, stored))
        })
        .collect()
}

pub(super) fn state(columns: &Columns<'_>) -> Result<MessageState, Error> {
    let word: &str = columns.get("state")?;
    MessageState::from_word(word).ok_or_else(|| {
        columns.wrong(
            "state",
            &format!("is {word}, which this version does not know"),
        )
    })
}

async fn insert(
    tx: &mut Tx,
    messages: &[&NewMessage],
    bucket: i64,
    check_at: Option<Timestamp>,
    doing: &'static str,
) -> Result<(), Error> {
    if messages.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = messages
        .iter()
        .map(|message| {
            (
                lists::hex(message.id.as_bytes()),
                &message.producer,
                &message.topic,
                &message.key,
                lists::hex(message.content_hash().as_bytes()),
                message.fence.map(|fence| lists::hex(fence.as_bytes())),
                message.deliver_after.map(Timestamp::as_micros),
            )
        })
        .collect();
    let (state, decided_at, decided_by) = match check_at {
        Some(_) => (MessageState::Prepared, None, None),
        None => (
            MessageState::Confirmed,
            Some(tx.now.as_micros()),
            Some(DecidedBy::Producer.as_str()),
        ),
    };
    sqlx::query(
        "-- insert messages
         INSERT INTO message (id, producer, topic, key, state, content_hash, bucket, fence,
                              deliver_after, check_at, prepared_at, decided_at, decided_by)
         WITH list AS MATERIALIZED (SELECT value AS m FROM json_each(?1))
         SELECT unhex(m ->> 0), m ->> 1, m ->> 2, m ->> 3, ?2, unhex(m ->> 4), ?3,
                unhex(m ->> 5), m ->> 6, ?4, ?5, ?6, ?7
           FROM list",
    )
    .bind(lists::rows(&list).map_err(error(doing))?)
    .bind(state.as_str())
    .bind(bucket)
    .bind(check_at.map(Timestamp::as_micros))
    .bind(tx.now.as_micros())
    .bind(decided_at)
    .bind(decided_by)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    bodies::put(&mut tx.db, bucket, messages)
        .await
        .map_err(error(doing))
}

/// Writes a line of a message's timeline that no column tells.
pub(super) async fn event(
    tx: &mut Tx,
    id: MessageId,
    kind: &str,
    detail: &str,
    doing: &'static str,
) -> Result<(), Error> {
    sqlx::query(
        "-- insert an event
         INSERT INTO message_event (message_id, at, kind, detail) VALUES (?, ?, ?, ?)",
    )
    .bind(&id.as_bytes()[..])
    .bind(tx.now.as_micros())
    .bind(kind)
    .bind(detail)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}
