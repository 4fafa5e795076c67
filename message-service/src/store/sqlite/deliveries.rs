//! Deliveries: claims, SENT, returns, answers, and what the recovery pass decides.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use super::bodies;
use super::checks::{chance, token};
use super::messages::event;
use super::rows::{Columns, error};
use super::topology;
use super::writer::{Kind, Tx};
use crate::message::delivery::{DeliveryEvent, Outcome};
use crate::message::{Answer, Delivery, DeliveryPolicy, DeliveryState, MessageId, Timestamp};
use crate::store::{
    AnswerOutcome, Claimed, DeliveryClaim, Error, FRESH_FOR, Lane, Overdue, OverdueDecision,
    Returned, Sent, Unsent, timeline,
};

pub(super) async fn claim(
    tx: &mut Tx,
    (subscription, lane, lease): &(String, Lane, Duration),
) -> Result<Claimed, Error> {
    let doing = Kind::Claim.doing();
    let always = Timestamp::from_micros(i64::MIN);
    let (sql, limit, max_bytes, confirmed_after) = match *lane {
        Lane::Normal { limit, max_bytes } => (CLAIM_NORMAL, limit, max_bytes, always),
        Lane::Fresh { limit, max_bytes } => {
            (CLAIM_NORMAL, limit, max_bytes, tx.now.before(FRESH_FOR))
        }
        Lane::Alone => (CLAIM_ALONE, 1, usize::MAX, always),
    };
    let rows = sqlx::query(sql)
        .bind(subscription)
        .bind(tx.now.as_micros())
        .bind(confirmed_after.as_micros())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut tx.db)
        .await
        .map_err(error(doing))?;
    let token = token(tx);
    let mut claimed = Claimed::default();
    let mut bytes = 0;
    for row in &rows {
        let columns = Columns::new(row, doing);
        let id = columns.id("message_id")?;
        let body = bodies::get(&mut tx.db, columns.get("bucket")?, id, doing).await?;
        bytes += body.bytes();
        if bytes > max_bytes && !claimed.deliveries.is_empty() {
            break;
        }
        sqlx::query(
            "-- lease a delivery
             UPDATE delivery
                SET due_at = ?, token = ?, generation = generation + 1, sent_at = ?,
                    first_sent_at = coalesce(first_sent_at, ?)
              WHERE message_id = ? AND subscription = ?",
        )
        .bind(tx.now.after(*lease).as_micros())
        .bind(&token.as_bytes()[..])
        .bind(tx.now.as_micros())
        .bind(tx.now.as_micros())
        .bind(&id.as_bytes()[..])
        .bind(subscription)
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
        claimed.deliveries.push(DeliveryClaim {
            id,
            generation: columns.count("generation")? + 1,
            token,
            producer: columns.get("producer")?,
            topic: columns.get("topic")?,
            key: columns.get("key")?,
            content_type: body.content_type,
            headers: body.headers,
            payload: body.payload,
            sent_at: tx.now,
            first_sent_at: columns.maybe_time("first_sent_at")?.unwrap_or(tx.now),
        });
    }
    let (alone_waits, next_due_in) = next_due(tx, subscription, doing).await?;
    claimed.alone_waits = alone_waits;
    claimed.next_due_in = next_due_in;
    Ok(claimed)
}

const CLAIM_NORMAL: &str = "-- claim deliveries
    SELECT d.message_id, d.generation, d.first_sent_at, m.producer, m.topic, m.key, m.bucket
      FROM delivery d JOIN message m ON m.id = d.message_id
     WHERE d.subscription = ? AND d.state = 'PENDING' AND d.stream_ends = 0 AND d.due_at <= ?
       AND d.confirmed_at > ?
     ORDER BY d.due_at LIMIT ?";

const CLAIM_ALONE: &str = "-- claim a delivery to be sent alone
    SELECT d.message_id, d.generation, d.first_sent_at, m.producer, m.topic, m.key, m.bucket
      FROM delivery d JOIN message m ON m.id = d.message_id
     WHERE d.subscription = ? AND d.state = 'PENDING' AND d.stream_ends > 0 AND d.due_at <= ?
       AND d.confirmed_at > ?
     ORDER BY d.due_at LIMIT ?";

/// Whether something that goes alone is due, and how long until anything is.
async fn next_due(
    tx: &mut Tx,
    subscription: &str,
    doing: &'static str,
) -> Result<(bool, Option<Duration>), Error> {
    let normal: Option<i64> = sqlx::query_scalar(
        "-- next due
         SELECT min(due_at) FROM delivery
          WHERE subscription = ? AND state = 'PENDING' AND stream_ends = 0",
    )
    .bind(subscription)
    .fetch_one(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let alone: Option<i64> = sqlx::query_scalar(
        "-- next due to go alone
         SELECT min(due_at) FROM delivery
          WHERE subscription = ? AND state = 'PENDING' AND stream_ends > 0",
    )
    .bind(subscription)
    .fetch_one(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let now = tx.now;
    let waits = |due: Option<i64>| due.map(|due| Timestamp::from_micros(due).since(now));
    let next = [waits(normal), waits(alone)].into_iter().flatten().min();
    Ok((alone.is_some_and(|due| due <= now.as_micros()), next))
}

pub(super) async fn mark_sent(
    tx: &mut Tx,
    (subscription, sent, resend_after): &(String, Vec<Sent>, Duration),
) -> Result<usize, Error> {
    let look_at = tx.now.after(*resend_after);
    leased(
        tx,
        "-- mark sent
         UPDATE delivery SET state = 'SENT', due_at = ?, token = NULL
          WHERE message_id = ? AND subscription = ? AND state = 'PENDING' AND token = ?",
        look_at,
        subscription,
        sent,
    )
    .await
}

pub(super) async fn renew(
    tx: &mut Tx,
    (subscription, sent, lease): &(String, Vec<Sent>, Duration),
) -> Result<usize, Error> {
    let until = tx.now.after(*lease);
    leased(
        tx,
        "-- renew a lease
         UPDATE delivery SET due_at = ?
          WHERE message_id = ? AND subscription = ? AND state = 'PENDING' AND token = ?",
        until,
        subscription,
        sent,
    )
    .await
}

async fn leased(
    tx: &mut Tx,
    sql: &'static str,
    due_at: Timestamp,
    subscription: &str,
    sent: &[Sent],
) -> Result<usize, Error> {
    let mut changed = 0;
    for Sent { id, token } in sent {
        let done = sqlx::query(sql)
            .bind(due_at.as_micros())
            .bind(&id.as_bytes()[..])
            .bind(subscription)
            .bind(&token.as_bytes()[..])
            .execute(&mut tx.db)
            .await
            .map_err(error(Kind::Sent.doing()))?;
        changed += usize::from(done.rows_affected() == 1);
    }
    Ok(changed)
}

pub(super) async fn return_unsent(
    tx: &mut Tx,
    (subscription, unsent): &(String, Vec<Unsent>),
) -> Result<usize, Error> {
    let doing = Kind::Return.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let mut changed = 0;
    for Unsent { id, token, why } in unsent {
        let leased: Option<i64> = sqlx::query_scalar(
            "-- does the lease hold
             SELECT 1 FROM delivery
              WHERE message_id = ? AND subscription = ? AND state = 'PENDING' AND token = ?",
        )
        .bind(&id.as_bytes()[..])
        .bind(subscription)
        .bind(&token.as_bytes()[..])
        .fetch_optional(&mut tx.db)
        .await
        .map_err(error(doing))?;
        if leased.is_none() {
            continue;
        }
        let outcome = happens(tx, *id, subscription, &why.event(), &policy, doing).await?;
        changed += usize::from(matches!(
            outcome,
            Some(Outcome::Again { .. } | Outcome::Dead { .. })
        ));
    }
    Ok(changed)
}

pub(super) async fn take_back(
    tx: &mut Tx,
    (subscription, returned, counts): &(String, Vec<Returned>, bool),
) -> Result<usize, Error> {
    let doing = Kind::Return.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let mut changed = 0;
    for Returned { id, generation } in returned {
        let happened = DeliveryEvent::StreamEnded {
            generation: *generation,
            counts: *counts,
        };
        let outcome = happens(tx, *id, subscription, &happened, &policy, doing).await?;
        changed += usize::from(matches!(
            outcome,
            Some(Outcome::Again { .. } | Outcome::Dead { .. })
        ));
    }
    Ok(changed)
}

pub(super) async fn acknowledge(
    tx: &mut Tx,
    (subscription, answers): &(String, Vec<Answer>),
) -> Result<Vec<AnswerOutcome>, Error> {
    let doing = Kind::Acknowledge.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let mut outcomes = Vec::with_capacity(answers.len());
    for answer in answers {
        let happened = DeliveryEvent::Answer(answer.generation, &answer.kind);
        let outcome = happens(tx, answer.id, subscription, &happened, &policy, doing).await?;
        outcomes.push(match outcome {
            None => AnswerOutcome::NoSuchDelivery,
            Some(Outcome::Stale) => AnswerOutcome::Stale,
            Some(
                Outcome::Again { .. }
                | Outcome::Consumed
                | Outcome::Dead { .. }
                | Outcome::Skipped
                | Outcome::AlreadySo,
            ) => AnswerOutcome::Recorded,
        });
    }
    Ok(outcomes)
}

pub(super) async fn overdue(
    db: &mut SqliteConnection,
    subscription: String,
    limit: usize,
    now: Timestamp,
) -> Result<Vec<Overdue>, Error> {
    let doing = "read overdue deliveries";
    let rows = sqlx::query(
        "-- overdue deliveries
         SELECT message_id, generation, sent_at, due_at FROM delivery
          WHERE subscription = ? AND state = 'SENT' AND due_at <= ?
          ORDER BY due_at LIMIT ?",
    )
    .bind(subscription)
    .bind(now.as_micros())
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(db)
    .await
    .map_err(error(doing))?;
    rows.iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            Ok(Overdue {
                id: columns.id("message_id")?,
                generation: columns.count("generation")?,
                sent_at: columns.time("sent_at")?,
                due_at: columns.time("due_at")?,
            })
        })
        .collect()
}

pub(super) async fn settle_overdue(
    tx: &mut Tx,
    (subscription, decisions): &(String, Vec<(Overdue, OverdueDecision)>),
) -> Result<usize, Error> {
    let doing = Kind::Recover.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let mut changed = 0;
    for (overdue, decision) in decisions {
        changed += usize::from(match decision {
            OverdueDecision::PassedBy => {
                let happened = DeliveryEvent::PassedBy(overdue.generation);
                let outcome =
                    happens(tx, overdue.id, subscription, &happened, &policy, doing).await?;
                matches!(outcome, Some(Outcome::Again { .. } | Outcome::Dead { .. }))
            }
            OverdueDecision::Wait(wait) => {
                let done = sqlx::query(
                    "-- look again later
                     UPDATE delivery SET due_at = ?
                      WHERE message_id = ? AND subscription = ? AND state = 'SENT'
                        AND generation = ? AND due_at = ?",
                )
                .bind(tx.now.after(*wait).as_micros())
                .bind(&overdue.id.as_bytes()[..])
                .bind(subscription)
                .bind(overdue.generation)
                .bind(overdue.due_at.as_micros())
                .execute(&mut tx.db)
                .await
                .map_err(error(doing))?;
                done.rows_affected() == 1
            }
        });
    }
    Ok(changed)
}

pub(super) async fn expire(
    tx: &mut Tx,
    (subscription, limit): &(String, usize),
) -> Result<usize, Error> {
    let doing = Kind::Recover.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let Some(max_age) = policy.max_age else {
        return Ok(0);
    };
    let rows = sqlx::query(
        "-- too old
         SELECT message_id FROM delivery
          WHERE subscription = ? AND state IN ('PENDING', 'SENT') AND confirmed_at < ?
          ORDER BY confirmed_at LIMIT ?",
    )
    .bind(subscription)
    .bind(tx.now.before(max_age).as_micros())
    .bind(i64::try_from(*limit).unwrap_or(i64::MAX))
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    for row in &rows {
        let id = Columns::new(row, doing).id("message_id")?;
        happens(tx, id, subscription, &DeliveryEvent::TooOld, &policy, doing).await?;
    }
    Ok(rows.len())
}

/// Lets an event happen to a delivery and writes what becomes of it. `None` if there is no such
/// delivery. A delivery in a state that this version does not know is left alone.
pub(super) async fn happens(
    tx: &mut Tx,
    id: MessageId,
    subscription: &str,
    happened: &DeliveryEvent<'_>,
    policy: &DeliveryPolicy,
    doing: &'static str,
) -> Result<Option<Outcome>, Error> {
    let row = sqlx::query(
        "-- read a delivery
         SELECT state, attempts, generation, answered_generation, laters, stream_ends,
                confirmed_at, sent_at
           FROM delivery WHERE message_id = ? AND subscription = ?",
    )
    .bind(&id.as_bytes()[..])
    .bind(subscription)
    .fetch_optional(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let Some(row) = row else {
        return Ok(None);
    };
    let columns = Columns::new(&row, doing);
    let Some(state) = DeliveryState::from_word(columns.get("state")?) else {
        return Ok(Some(Outcome::Stale));
    };
    let delivery = Delivery {
        state,
        attempts: columns.count("attempts")?,
        generation: columns.count("generation")?,
        answered_generation: columns.count("answered_generation")?,
        laters: columns.count("laters")?,
        stream_ends: columns.count("stream_ends")?,
        confirmed_at: columns.time("confirmed_at")?,
        sent_at: columns.maybe_time("sent_at")?,
    };
    let chance = chance(tx);
    let outcome = delivery.apply(happened, policy, tx.now, chance);
    write_outcome(tx, id, subscription, happened, &outcome, doing).await?;
    Ok(Some(outcome))
}

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
        Outcome::Consumed => ends(tx, id, subscription, DeliveryState::Consumed, doing).await?,
        Outcome::Skipped => ends(tx, id, subscription, DeliveryState::Skipped, doing).await?,
        Outcome::Dead {
            attempts,
            error: reason,
        } => {
            ends(tx, id, subscription, DeliveryState::Dead, doing).await?;
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

async fn ends(
    tx: &mut Tx,
    id: MessageId,
    subscription: &str,
    state: DeliveryState,
    doing: &'static str,
) -> Result<(), Error> {
    sqlx::query(
        "-- end a delivery
         UPDATE delivery SET state = ?, due_at = NULL, token = NULL, answered_at = ?
          WHERE message_id = ? AND subscription = ?",
    )
    .bind(state.as_str())
    .bind(tx.now.as_micros())
    .bind(&id.as_bytes()[..])
    .bind(subscription)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}
