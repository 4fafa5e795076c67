//! Decisions about messages: confirm and cancel, and the deliveries that a confirm creates.

use std::collections::{BTreeMap, BTreeSet};

use super::lists;
use super::messages::{Stored, event, stored};
use super::rows::error;
use super::writer::{Kind, Tx};
use crate::message::{Effect, MessageId, MessageState};
use crate::store::{DecidedBy, Decision, Error, Refusal, Written};

pub(super) async fn decide(
    tx: &mut Tx,
    (producer, decisions): &(String, Vec<Decision>),
) -> Result<Written, Error> {
    let doing = Kind::Decide.doing();
    let mut written = Written::default();
    for part in lists::parts(decisions, |decision| [decision.id]) {
        let mut stored = stored(tx, part.iter().map(|decision| decision.id), doing).await?;
        let mut moved = Vec::new();
        for Decision { id, event } in part {
            let stored = stored.remove(id);
            let Some(stored) = stored.filter(|stored| stored.producer == *producer) else {
                written.items.push(Err(Refusal::NoSuchMessage(*id)));
                continue;
            };
            written.items.push(match stored.state.apply(*event) {
                Ok(Effect::AlreadySo) => Ok(stored.state),
                Ok(Effect::Moves(next)) => {
                    moved.push((*id, stored, next));
                    Ok(next)
                }
                Err(wrong) => {
                    if wrong.is_conflict() {
                        conflict(tx, *id, &wrong.to_string(), doing).await?;
                    }
                    Err(Refusal::WrongState { id: *id, wrong })
                }
            });
        }
        moves(tx, moved, DecidedBy::Producer, doing, &mut written.topics).await?;
    }
    Ok(written)
}

/// Writes decisions: the messages' new states and, for CONFIRMED, their deliveries.
pub(super) async fn moves(
    tx: &mut Tx,
    moved: Vec<(MessageId, Stored, MessageState)>,
    by: DecidedBy,
    doing: &'static str,
    topics: &mut BTreeSet<String>,
) -> Result<(), Error> {
    let mut by_state: BTreeMap<MessageState, Vec<MessageId>> = BTreeMap::new();
    for (id, stored, next) in moved {
        by_state.entry(next).or_default().push(id);
        if next == MessageState::Confirmed {
            topics.insert(stored.topic);
        }
    }
    for (next, ids) in by_state {
        let ids = lists::ids(ids);
        sqlx::query(
            "-- decide
             UPDATE message INDEXED BY sqlite_autoindex_message_1
                SET state = ?2, decided_at = ?3, decided_by = ?4, check_at = NULL,
                    check_token = NULL, unresolved = 0
              WHERE id IN (SELECT unhex(value) FROM json_each(?1)) AND state = 'PREPARED'",
        )
        .bind(&ids)
        .bind(next.as_str())
        .bind(tx.now.as_micros())
        .bind(by.as_str())
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
        if next == MessageState::Confirmed {
            confirmed(tx, &ids, doing).await?;
        }
    }
    Ok(())
}

/// Creates the deliveries of messages that are CONFIRMED now, by joining the subscriptions that
/// are active at this moment.
pub(super) async fn confirmed(tx: &mut Tx, ids: &str, doing: &'static str) -> Result<(), Error> {
    sqlx::query(
        "-- create deliveries
         INSERT INTO delivery (message_id, subscription, state, due_at, confirmed_at)
         SELECT m.id, s.name, 'PENDING', max(?2, coalesce(m.deliver_after, ?2)), ?2
           FROM json_each(?1) CROSS JOIN message m ON m.id = unhex(value)
                CROSS JOIN subscription s ON s.topic = m.topic AND s.active = 1",
    )
    .bind(ids)
    .bind(tx.now.as_micros())
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    sqlx::query(
        "-- mark unsubscribed
         UPDATE message INDEXED BY sqlite_autoindex_message_1 SET unsubscribed = 1
          WHERE id IN (SELECT unhex(value) FROM json_each(?1))
            AND NOT EXISTS (SELECT 1 FROM subscription s
                             WHERE s.topic = message.topic AND s.active = 1)",
    )
    .bind(ids)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}

/// Marks a message whose decision was contradicted. The first contradiction is kept.
pub(super) async fn conflict(
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
        event(tx, id, "conflict", detail, doing).await?;
        tracing::error!(message.id = %id, detail, "a final decision was contradicted");
    }
    Ok(())
}
