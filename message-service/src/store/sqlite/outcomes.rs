//! What events make of deliveries.

use std::collections::HashMap;

use super::checks::chance;
use super::lists;
use super::messages::event;
use super::rows::{Columns, error};
use super::writer::Tx;
use crate::message::delivery::{DeliveryEvent, Outcome};
use crate::message::{Delivery, DeliveryPolicy, DeliveryState, MessageId};
use crate::store::{Error, timeline};

/// Lets events happen to deliveries and writes what becomes of them. `None` where there is no
/// such delivery. A delivery in a state that this version does not know is left alone.
pub(super) async fn happen(
    tx: &mut Tx,
    subscription: &str,
    events: &[(MessageId, DeliveryEvent<'_>)],
    policy: &DeliveryPolicy,
    doing: &'static str,
) -> Result<Vec<Option<Outcome>>, Error> {
    let mut outcomes = Vec::with_capacity(events.len());
    for part in lists::parts(events, |(id, _)| [*id]) {
        let ids = part.iter().map(|(id, _)| *id);
        let deliveries = read(tx, subscription, ids, doing).await?;
        let (mut consumed, mut skipped) = (Vec::new(), Vec::new());
        for (id, happened) in part {
            let outcome = match deliveries.get(id) {
                None => None,
                Some(None) => Some(Outcome::Stale),
                Some(Some(delivery)) => {
                    let chance = chance(tx);
                    Some(delivery.apply(happened, policy, tx.now, chance))
                }
            };
            match &outcome {
                Some(Outcome::Consumed) => consumed.push(*id),
                Some(Outcome::Skipped) => skipped.push(*id),
                _ => {}
            }
            if let Some(outcome) = &outcome {
                write_outcome(tx, *id, subscription, happened, outcome, doing).await?;
            }
            outcomes.push(outcome);
        }
        end(tx, subscription, consumed, DeliveryState::Consumed, doing).await?;
        end(tx, subscription, skipped, DeliveryState::Skipped, doing).await?;
    }
    Ok(outcomes)
}

/// Reads deliveries; `None` for one whose state this version does not know.
async fn read(
    tx: &mut Tx,
    subscription: &str,
    ids: impl IntoIterator<Item = MessageId>,
    doing: &'static str,
) -> Result<HashMap<MessageId, Option<Delivery>>, Error> {
    let rows = sqlx::query(
        "-- read deliveries
         SELECT d.message_id, d.state, d.attempts, d.generation, d.answered_generation, d.laters,
                d.stream_ends, d.confirmed_at, d.sent_at
           FROM json_each(?1) CROSS JOIN delivery d INDEXED BY sqlite_autoindex_delivery_1
                  ON d.message_id = unhex(value) AND d.subscription = ?2",
    )
    .bind(lists::ids(ids))
    .bind(subscription)
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let mut deliveries = HashMap::with_capacity(rows.len());
    for row in &rows {
        let columns = Columns::new(row, doing);
        let delivery = match DeliveryState::from_word(columns.get("state")?) {
            None => None,
            Some(state) => Some(Delivery {
                state,
                attempts: columns.count("attempts")?,
                generation: columns.count("generation")?,
                answered_generation: columns.count("answered_generation")?,
                laters: columns.count("laters")?,
                stream_ends: columns.count("stream_ends")?,
                confirmed_at: columns.time("confirmed_at")?,
                sent_at: columns.maybe_time("sent_at")?,
            }),
        };
        deliveries.insert(columns.id("message_id")?, delivery);
    }
    Ok(deliveries)
}

/// Writes what is rare enough to be written by itself; CONSUMED and SKIPPED are not.
async fn write_outcome(
    tx: &mut Tx,
    id: MessageId,
    subscription: &str,
    happened: &DeliveryEvent<'_>,
    outcome: &Outcome,
    doing: &'static str,
) -> Result<(), Error> {
    match outcome {
        Outcome::AlreadySo | Outcome::Stale => return Ok(()),
        Outcome::Consumed | Outcome::Skipped => {}
        Outcome::Again {
            due_at,
            attempts,
            laters,
            stream_ends,
            error: reason,
        } => {
            sqlx::query(
                "-- again
                 UPDATE delivery
                    SET state = 'PENDING', due_at = ?, token = NULL, attempts = ?, laters = ?,
                        stream_ends = ?, answered_generation = generation,
                        last_error = coalesce(?, last_error)
                  WHERE message_id = ? AND subscription = ?",
            )
            .bind(due_at.as_micros())
            .bind(attempts)
            .bind(laters)
            .bind(stream_ends)
            .bind(reason)
            .bind(&id.as_bytes()[..])
            .bind(subscription)
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
        }
        Outcome::Dead {
            attempts,
            error: reason,
        } => {
            end(tx, subscription, vec![id], DeliveryState::Dead, doing).await?;
            sqlx::query(
                "-- why it is dead
                 UPDATE delivery SET attempts = ?, last_error = ?
                  WHERE message_id = ? AND subscription = ?",
            )
            .bind(attempts)
            .bind(reason)
            .bind(&id.as_bytes()[..])
            .bind(subscription)
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
        }
    }
    for (kind, detail) in timeline::lines(happened, outcome) {
        event(tx, id, Some(subscription), kind, &detail, doing).await?;
    }
    Ok(())
}

async fn end(
    tx: &mut Tx,
    subscription: &str,
    ids: Vec<MessageId>,
    state: DeliveryState,
    doing: &'static str,
) -> Result<(), Error> {
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "-- end deliveries
         UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
            SET state = ?3, due_at = NULL, token = NULL, answered_at = ?4
          WHERE message_id IN (SELECT unhex(value) FROM json_each(?1)) AND subscription = ?2",
    )
    .bind(lists::ids(ids))
    .bind(subscription)
    .bind(state.as_str())
    .bind(tx.now.as_micros())
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}
