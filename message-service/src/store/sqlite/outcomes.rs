//! What events make of deliveries.

use std::collections::HashMap;

use super::checks::chance;
use super::lists;
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
        let mut writes = Writes::default();
        for (id, happened) in part {
            let outcome = match deliveries.get(id) {
                None => None,
                Some(None) => Some(Outcome::Stale),
                Some(Some(delivery)) => {
                    let chance = chance(tx);
                    Some(delivery.apply(happened, policy, tx.now, chance))
                }
            };
            if let Some(outcome) = &outcome {
                writes.note(*id, happened, outcome);
            }
            outcomes.push(outcome);
        }
        writes.write(tx, subscription, doing).await?;
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

/// What is to be written about the deliveries of a list.
#[derive(Default)]
struct Writes {
    consumed: Vec<MessageId>,
    skipped: Vec<MessageId>,
    dead: Vec<(String, u32, String)>,
    again: Vec<(String, i64, u32, u32, u32, Option<String>)>,
    /// Message, kind and detail.
    events: Vec<(String, &'static str, String)>,
}

impl Writes {
    fn note(&mut self, id: MessageId, happened: &DeliveryEvent<'_>, outcome: &Outcome) {
        let hex = || lists::hex(id.as_bytes());
        match outcome {
            Outcome::AlreadySo | Outcome::Stale => return,
            Outcome::Consumed => self.consumed.push(id),
            Outcome::Skipped => self.skipped.push(id),
            Outcome::Dead { attempts, error } => {
                self.dead.push((hex(), *attempts, error.clone()));
            }
            Outcome::Again {
                due_at,
                attempts,
                laters,
                stream_ends,
                error,
            } => self.again.push((
                hex(),
                due_at.as_micros(),
                *attempts,
                *laters,
                *stream_ends,
                error.clone(),
            )),
        }
        let lines = timeline::lines(happened, outcome);
        let events = lines.map(|(kind, detail)| (hex(), kind, detail));
        self.events.extend(events);
    }

    async fn write(
        self,
        tx: &mut Tx,
        subscription: &str,
        doing: &'static str,
    ) -> Result<(), Error> {
        let now = tx.now;
        for (ids, state) in [
            (self.consumed, DeliveryState::Consumed),
            (self.skipped, DeliveryState::Skipped),
        ] {
            if ids.is_empty() {
                continue;
            }
            sqlx::query(
                "-- end deliveries
                 UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
                    SET state = ?4, due_at = NULL, token = NULL, answered_at = ?3
                  WHERE message_id IN (SELECT unhex(value) FROM json_each(?1))
                    AND subscription = ?2",
            )
            .bind(lists::ids(ids))
            .bind(subscription)
            .bind(now.as_micros())
            .bind(state.as_str())
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
        }
        let dead = "-- give deliveries up
            UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
               SET state = 'DEAD', due_at = NULL, token = NULL, answered_at = ?3,
                   attempts = dead.value ->> 1, last_error = dead.value ->> 2
              FROM json_each(?1) AS dead
             WHERE message_id = unhex(dead.value ->> 0) AND subscription = ?2";
        rows(tx, dead, &self.dead, subscription, doing).await?;
        let again = "-- send deliveries again
            UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
               SET state = 'PENDING', due_at = again.value ->> 1, token = NULL,
                   attempts = again.value ->> 2, laters = again.value ->> 3,
                   stream_ends = again.value ->> 4, answered_generation = generation,
                   last_error = coalesce(again.value ->> 5, last_error)
              FROM json_each(?1) AS again
             WHERE message_id = unhex(again.value ->> 0) AND subscription = ?2";
        rows(tx, again, &self.again, subscription, doing).await?;
        let events = "-- insert events
            INSERT INTO message_event (message_id, subscription, at, kind, detail)
            SELECT unhex(value ->> 0), ?2, ?3, value ->> 1, value ->> 2
              FROM json_each(?1) ORDER BY key";
        rows(tx, events, &self.events, subscription, doing).await
    }
}

/// Runs a statement with a list of rows, the subscription and the time, if there are rows.
async fn rows<T: serde::Serialize>(
    tx: &mut Tx,
    sql: &'static str,
    rows: &[T],
    subscription: &str,
    doing: &'static str,
) -> Result<(), Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(sql)
        .bind(lists::rows(rows).map_err(error(doing))?)
        .bind(subscription)
        .bind(tx.now.as_micros())
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    Ok(())
}
