//! Deliveries: claims, SENT, returns, answers, and what the recovery pass decides. What becomes of
//! a delivery is written in [`super::outcomes`].

use std::collections::HashMap;
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::bodies::{self, Body};
use super::checks::token;
use super::lists;
use super::outcomes::happen;
use super::rows::{Columns, error};
use super::topology;
use super::writer::{Kind, Tx};
use crate::message::delivery::{DeliveryEvent, Outcome};
use crate::message::{Answer, MessageId, Timestamp};
use crate::store::{
    AnswerOutcome, Claimed, DeliveryClaim, Error, FRESH_FOR, Lane, Overdue, OverdueDecision,
    Returned, Sent, Unsent,
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
    let mut due = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns = Columns::new(row, doing);
        due.push((columns.id("message_id")?, columns.get("bucket")?));
    }
    let bodies = bodies_within(tx, &due, max_bytes, doing).await?;
    due.truncate(bodies.len());
    let token = token(tx);
    if !due.is_empty() {
        sqlx::query(
            "-- lease deliveries
             UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
                SET due_at = ?3, token = ?4, generation = generation + 1, sent_at = ?5,
                    first_sent_at = coalesce(first_sent_at, ?5)
              WHERE message_id IN (SELECT unhex(value) FROM json_each(?1))
                AND subscription = ?2",
        )
        .bind(lists::ids(due.iter().map(|(id, _)| *id)))
        .bind(subscription)
        .bind(tx.now.after(*lease).as_micros())
        .bind(&token.as_bytes()[..])
        .bind(tx.now.as_micros())
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    }
    let mut claimed = Claimed::default();
    for (row, body) in rows.iter().zip(bodies) {
        let columns = Columns::new(row, doing);
        claimed.deliveries.push(DeliveryClaim {
            id: columns.id("message_id")?,
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

/// The bodies of the first of these messages with their buckets, as many as there are within so
/// many bytes, but at least one.
async fn bodies_within(
    tx: &mut Tx,
    due: &[(MessageId, i64)],
    max_bytes: usize,
    doing: &'static str,
) -> Result<Vec<Body>, Error> {
    let mut found = Vec::with_capacity(due.len());
    let mut left = max_bytes;
    for same in due.chunk_by(|(_, one), (_, other)| one == other) {
        let ids: Vec<_> = same.iter().map(|(id, _)| *id).collect();
        let at_least = usize::from(found.is_empty());
        let bodies = bodies::read(&mut tx.db, same[0].1, &ids, left, at_least, doing).await?;
        let all = bodies.len() == same.len();
        left = left.saturating_sub(bodies.iter().map(Body::bytes).sum());
        found.extend(bodies);
        if !all {
            break;
        }
    }
    Ok(found)
}

/// Whether something that goes alone is due, and how long until anything is.
async fn next_due(
    tx: &mut Tx,
    subscription: &str,
    doing: &'static str,
) -> Result<(bool, Option<Duration>), Error> {
    let row = sqlx::query(
        "-- next due
         SELECT (SELECT min(due_at) FROM delivery
                  WHERE subscription = ?1 AND state = 'PENDING' AND stream_ends = 0) AS normal,
                (SELECT min(due_at) FROM delivery
                  WHERE subscription = ?1 AND state = 'PENDING' AND stream_ends > 0) AS alone",
    )
    .bind(subscription)
    .fetch_one(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let columns = Columns::new(&row, doing);
    let (normal, alone): (Option<i64>, Option<i64>) =
        (columns.get("normal")?, columns.get("alone")?);
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
         UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1
            SET state = 'SENT', due_at = ?3, token = NULL
           FROM json_each(?1) AS sent
          WHERE message_id = unhex(sent.value ->> 0) AND subscription = ?2
            AND state = 'PENDING' AND token = unhex(sent.value ->> 1)",
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
        "-- renew leases
         UPDATE delivery INDEXED BY sqlite_autoindex_delivery_1 SET due_at = ?3
           FROM json_each(?1) AS sent
          WHERE message_id = unhex(sent.value ->> 0) AND subscription = ?2
            AND state = 'PENDING' AND token = unhex(sent.value ->> 1)",
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
    let doing = Kind::Sent.doing();
    let leases: Vec<_> = sent
        .iter()
        .map(|sent| {
            [
                lists::hex(sent.id.as_bytes()),
                lists::hex(sent.token.as_bytes()),
            ]
        })
        .collect();
    let done = sqlx::query(sql)
        .bind(lists::rows(&leases).map_err(error(doing))?)
        .bind(subscription)
        .bind(due_at.as_micros())
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    Ok(usize::try_from(done.rows_affected()).unwrap_or(usize::MAX))
}

pub(super) async fn return_unsent(
    tx: &mut Tx,
    (subscription, unsent): &(String, Vec<Unsent>),
) -> Result<usize, Error> {
    let doing = Kind::Return.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let mut changed = 0;
    for part in lists::parts(unsent, |unsent| [unsent.id]) {
        let tokens = tokens(tx, subscription, part.iter().map(|unsent| unsent.id)).await?;
        let events: Vec<_> = part
            .iter()
            .filter(|unsent| tokens.get(&unsent.id) == Some(&unsent.token))
            .map(|unsent| (unsent.id, unsent.why.event()))
            .collect();
        let outcomes = happen(tx, subscription, &events, &policy, doing).await?;
        changed += outcomes.iter().filter(|outcome| is_back(outcome)).count();
    }
    Ok(changed)
}

/// The leases of deliveries that are PENDING.
async fn tokens(
    tx: &mut Tx,
    subscription: &str,
    ids: impl IntoIterator<Item = MessageId>,
) -> Result<HashMap<MessageId, Uuid>, Error> {
    let doing = Kind::Return.doing();
    let rows = sqlx::query(
        "-- who holds the leases
         SELECT d.message_id, d.token
           FROM json_each(?1) CROSS JOIN delivery d INDEXED BY sqlite_autoindex_delivery_1
                  ON d.message_id = unhex(value) AND d.subscription = ?2
          WHERE d.state = 'PENDING' AND d.token IS NOT NULL",
    )
    .bind(lists::ids(ids))
    .bind(subscription)
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let mut tokens = HashMap::with_capacity(rows.len());
    for row in &rows {
        let columns = Columns::new(row, doing);
        if let Some(token) = columns.uuid("token")? {
            tokens.insert(columns.id("message_id")?, token);
        }
    }
    Ok(tokens)
}

pub(super) async fn take_back(
    tx: &mut Tx,
    (subscription, returned, counts): &(String, Vec<Returned>, bool),
) -> Result<usize, Error> {
    let doing = Kind::Return.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let ended = |returned: &Returned| DeliveryEvent::StreamEnded {
        generation: returned.generation,
        counts: *counts,
    };
    let events: Vec<_> = returned.iter().map(|one| (one.id, ended(one))).collect();
    let outcomes = happen(tx, subscription, &events, &policy, doing).await?;
    Ok(outcomes.iter().filter(|outcome| is_back(outcome)).count())
}

/// Whether the delivery is no longer on its way.
fn is_back(outcome: &Option<Outcome>) -> bool {
    matches!(outcome, Some(Outcome::Again { .. } | Outcome::Dead { .. }))
}

pub(super) async fn acknowledge(
    tx: &mut Tx,
    (subscription, answers): &(String, Vec<Answer>),
) -> Result<Vec<AnswerOutcome>, Error> {
    let doing = Kind::Acknowledge.doing();
    let policy = topology::policy(&mut tx.db, subscription, doing).await?;
    let events: Vec<_> = answers
        .iter()
        .map(|answer| {
            let happened = DeliveryEvent::Answer(answer.generation, &answer.kind);
            (answer.id, happened)
        })
        .collect();
    let outcomes = happen(tx, subscription, &events, &policy, doing).await?;
    let outcomes = outcomes.into_iter().map(|outcome| match outcome {
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
    Ok(outcomes.collect())
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
    let (mut lost, mut changed) = (Vec::new(), 0);
    for (overdue, decision) in decisions {
        match decision {
            OverdueDecision::PassedBy => {
                lost.push((overdue.id, DeliveryEvent::PassedBy(overdue.generation)));
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
                changed += usize::from(done.rows_affected() == 1);
            }
        }
    }
    let outcomes = happen(tx, subscription, &lost, &policy, doing).await?;
    Ok(changed + outcomes.iter().filter(|outcome| is_back(outcome)).count())
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
    let mut events = Vec::with_capacity(rows.len());
    for row in &rows {
        let id = Columns::new(row, doing).id("message_id")?;
        events.push((id, DeliveryEvent::TooOld));
    }
    happen(tx, subscription, &events, &policy, doing).await?;
    Ok(rows.len())
}
