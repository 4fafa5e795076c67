//! The producer's verbs: prepare, publish, confirm, cancel.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use super::bodies;
use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::{Effect, MessageEvent, MessageId, MessageState, NewMessage, Timestamp};
use crate::store::{DecidedBy, Decision, Error, ItemResult, Refusal, Written};

/// What a verb needs to know of a stored message.
pub(super) struct Stored {
    pub(super) producer: String,
    pub(super) topic: String,
    pub(super) state: MessageState,
    pub(super) content_hash: Vec<u8>,
    pub(super) deliver_after: Option<Timestamp>,
}

pub(super) async fn prepare(
    tx: &mut Tx,
    (messages, check_after): &(Vec<NewMessage>, Duration),
) -> Result<Written, Error> {
    let doing = Kind::Prepare.doing();
    let bucket = bodies::current(&mut tx.db, tx.now)
        .await
        .map_err(error(doing))?;
    let mut written = Written::default();
    for message in messages {
        let item = match handed_over(tx, message, MessageEvent::Prepare, doing).await? {
            HandedOver::New => {
                let check_at = tx.now.after(*check_after);
                insert(tx, message, bucket, Some(check_at), doing).await?;
                Ok(MessageState::Prepared)
            }
            HandedOver::Again(stored) => Ok(stored.state),
            HandedOver::Move(..) => {
                return Err(Error::Inconsistent {
                    doing,
                    what: format!("a prepare would move message {}", message.id),
                });
            }
            HandedOver::Refused(refusal) => Err(refusal),
        };
        written.items.push(item);
    }
    Ok(written)
}

pub(super) async fn publish(
    tx: &mut Tx,
    (messages,): &(Vec<NewMessage>,),
) -> Result<Written, Error> {
    let doing = Kind::Publish.doing();
    let bucket = bodies::current(&mut tx.db, tx.now)
        .await
        .map_err(error(doing))?;
    let mut written = Written::default();
    for message in messages {
        let item = match handed_over(tx, message, MessageEvent::Publish, doing).await? {
            HandedOver::New => {
                insert(tx, message, bucket, None, doing).await?;
                confirmed(tx, message.id, &message.topic, message.deliver_after, doing).await?;
                written.topics.insert(message.topic.clone());
                Ok(MessageState::Confirmed)
            }
            HandedOver::Again(stored) => Ok(stored.state),
            HandedOver::Move(stored, next) => {
                moves(
                    tx,
                    message.id,
                    &stored,
                    next,
                    DecidedBy::Producer,
                    doing,
                    &mut written.topics,
                )
                .await?;
                Ok(next)
            }
            HandedOver::Refused(refusal) => Err(refusal),
        };
        written.items.push(item);
    }
    Ok(written)
}

pub(super) async fn decide(
    tx: &mut Tx,
    (producer, decisions): &(String, Vec<Decision>),
) -> Result<Written, Error> {
    let doing = Kind::Decide.doing();
    let mut written = Written::default();
    for decision in decisions {
        let item = decide_one(tx, producer, *decision, doing, &mut written.topics).await?;
        written.items.push(item);
    }
    Ok(written)
}

async fn decide_one(
    tx: &mut Tx,
    producer: &str,
    Decision { id, event }: Decision,
    doing: &'static str,
    topics: &mut BTreeSet<String>,
) -> Result<ItemResult, Error> {
    let stored = stored(&mut tx.db, id, doing).await?;
    let Some(stored) = stored.filter(|stored| stored.producer == producer) else {
        return Ok(Err(Refusal::NoSuchMessage(id)));
    };
    match stored.state.apply(event) {
        Ok(Effect::AlreadySo) => Ok(Ok(stored.state)),
        Ok(Effect::Moves(next)) => {
            moves(tx, id, &stored, next, DecidedBy::Producer, doing, topics).await?;
            Ok(Ok(next))
        }
        Err(wrong) => {
            if wrong.is_conflict() {
                conflict(tx, id, &wrong.to_string(), doing).await?;
            }
            Ok(Err(Refusal::WrongState { id, wrong }))
        }
    }
}

/// Writes a decision: the message's new state and, for CONFIRMED, its deliveries.
pub(super) async fn moves(
    tx: &mut Tx,
    id: MessageId,
    stored: &Stored,
    next: MessageState,
    by: DecidedBy,
    doing: &'static str,
    topics: &mut BTreeSet<String>,
) -> Result<(), Error> {
    sqlx::query(
        "-- decide
         UPDATE message
            SET state = ?, decided_at = ?, decided_by = ?, check_at = NULL, check_token = NULL,
                unresolved = 0
          WHERE id = ? AND state = 'PREPARED'",
    )
    .bind(next.as_str())
    .bind(tx.now.as_micros())
    .bind(by.as_str())
    .bind(&id.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    if next == MessageState::Confirmed {
        confirmed(tx, id, &stored.topic, stored.deliver_after, doing).await?;
        topics.insert(stored.topic.clone());
    }
    Ok(())
}

/// Creates the deliveries of a message that is CONFIRMED now, by joining the subscriptions that
/// are active at this moment.
async fn confirmed(
    tx: &mut Tx,
    id: MessageId,
    topic: &str,
    deliver_after: Option<Timestamp>,
    doing: &'static str,
) -> Result<(), Error> {
    let due_at = deliver_after.unwrap_or(tx.now).max(tx.now);
    let created = sqlx::query(
        "-- create deliveries
         INSERT INTO delivery (message_id, subscription, state, due_at, confirmed_at)
         SELECT ?, name, 'PENDING', ?, ? FROM subscription WHERE topic = ? AND active = 1",
    )
    .bind(&id.as_bytes()[..])
    .bind(due_at.as_micros())
    .bind(tx.now.as_micros())
    .bind(topic)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    if created.rows_affected() == 0 {
        sqlx::query("-- mark unsubscribed\nUPDATE message SET unsubscribed = 1 WHERE id = ?")
            .bind(&id.as_bytes()[..])
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
    }
    Ok(())
}

/// Marks a message whose decision was contradicted. The first contradiction is kept.
async fn conflict(
    tx: &mut Tx,
    id: MessageId,
    detail: &str,
    doing: &'static str,
) -> Result<(), Error> {
    let marked = sqlx::query(
        "-- mark conflict\nUPDATE message SET conflict = 1 WHERE id = ? AND conflict = 0",
    )
    .bind(&id.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    if marked.rows_affected() == 1 {
        event(tx, id, None, "conflict", detail, doing).await?;
        tracing::error!(message.id = %id, detail, "a final decision was contradicted");
    }
    Ok(())
}

enum HandedOver {
    New,
    Again(Stored),
    Move(Stored, MessageState),
    Refused(Refusal),
}

/// What handing this message over means, given what is stored under its id and its key.
async fn handed_over(
    tx: &mut Tx,
    message: &NewMessage,
    event: MessageEvent,
    doing: &'static str,
) -> Result<HandedOver, Error> {
    let id = message.id;
    if let Some(stored) = stored(&mut tx.db, id, doing).await? {
        if stored.producer != message.producer {
            return Ok(HandedOver::Refused(Refusal::IdTaken(id)));
        }
        if stored.content_hash != message.content_hash().as_bytes() {
            let state = stored.state;
            return Ok(HandedOver::Refused(Refusal::OtherContent { id, state }));
        }
        return Ok(match stored.state.apply(event) {
            Ok(Effect::AlreadySo) => HandedOver::Again(stored),
            Ok(Effect::Moves(next)) => HandedOver::Move(stored, next),
            Err(wrong) => {
                if wrong.is_conflict() {
                    conflict(tx, id, &wrong.to_string(), doing).await?;
                }
                HandedOver::Refused(Refusal::WrongState { id, wrong })
            }
        });
    }
    let Some(key) = &message.key else {
        return Ok(HandedOver::New);
    };
    let Some((holder, state)) = holder(tx, message, key, doing).await? else {
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

async fn holder(
    tx: &mut Tx,
    message: &NewMessage,
    key: &str,
    doing: &'static str,
) -> Result<Option<(MessageId, MessageState)>, Error> {
    let row = sqlx::query(
        "-- who holds the key
         SELECT id, state FROM message
          WHERE producer = ? AND topic = ? AND key = ? AND key IS NOT NULL
            AND state <> 'CANCELLED'",
    )
    .bind(&message.producer)
    .bind(&message.topic)
    .bind(key)
    .fetch_optional(&mut tx.db)
    .await
    .map_err(error(doing))?;
    row.map(|row| {
        let columns = Columns::new(&row, doing);
        Ok((columns.id("id")?, state(&columns)?))
    })
    .transpose()
}

/// Reads what is stored under an id, whoever's it is.
pub(super) async fn stored(
    db: &mut SqliteConnection,
    id: MessageId,
    doing: &'static str,
) -> Result<Option<Stored>, Error> {
    let row = sqlx::query(
        "-- what is stored
         SELECT producer, topic, state, content_hash, deliver_after FROM message WHERE id = ?",
    )
    .bind(&id.as_bytes()[..])
    .fetch_optional(db)
    .await
    .map_err(error(doing))?;
    row.map(|row| {
        let columns = Columns::new(&row, doing);
        Ok(Stored {
            producer: columns.get("producer")?,
            topic: columns.get("topic")?,
            state: state(&columns)?,
            content_hash: columns.get("content_hash")?,
            deliver_after: columns.maybe_time("deliver_after")?,
        })
    })
    .transpose()
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
    message: &NewMessage,
    bucket: i64,
    check_at: Option<Timestamp>,
    doing: &'static str,
) -> Result<(), Error> {
    let published = check_at.is_none();
    let decided_at = published.then_some(tx.now.as_micros());
    sqlx::query(
        "-- insert a message
         INSERT INTO message (id, producer, topic, key, state, content_hash, bucket, fence,
                              deliver_after, check_at, prepared_at, decided_at, decided_by)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&message.id.as_bytes()[..])
    .bind(&message.producer)
    .bind(&message.topic)
    .bind(&message.key)
    .bind(
        if published {
            MessageState::Confirmed
        } else {
            MessageState::Prepared
        }
        .as_str(),
    )
    .bind(message.content_hash().as_bytes())
    .bind(bucket)
    .bind(message.fence.as_ref().map(|fence| &fence.as_bytes()[..]))
    .bind(message.deliver_after.map(Timestamp::as_micros))
    .bind(check_at.map(Timestamp::as_micros))
    .bind(tx.now.as_micros())
    .bind(decided_at)
    .bind(published.then_some(DecidedBy::Producer.as_str()))
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    bodies::put(&mut tx.db, bucket, message)
        .await
        .map_err(error(doing))
}

/// Writes a line of the timeline that no column tells.
pub(super) async fn event(
    tx: &mut Tx,
    id: MessageId,
    subscription: Option<&str>,
    kind: &str,
    detail: &str,
    doing: &'static str,
) -> Result<(), Error> {
    sqlx::query(
        "-- insert an event
         INSERT INTO message_event (message_id, subscription, at, kind, detail)
         VALUES (?, ?, ?, ?, ?)",
    )
    .bind(&id.as_bytes()[..])
    .bind(subscription)
    .bind(tx.now.as_micros())
    .bind(kind)
    .bind(detail)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}
