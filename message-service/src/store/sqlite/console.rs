//! What people and producers look at.

use sqlx::AssertSqlSafe;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::bodies;
use super::messages::state;
use super::rows::{Columns, error};
use crate::message::{DeliveryState, MessageId, MessageState, Timestamp};
use crate::store::{
    Counts, DecidedBy, DeliveryCursor, DeliveryView, Error, EventView, MessageFilter, MessageView,
    Shown, SubscriptionCounts,
};

const MESSAGE: &str = "SELECT id, producer, topic, key, state, decided_by, prepared_at, decided_at,
            checks, check_at, unresolved, conflict, unsubscribed, bucket FROM message";
const DELIVERY: &str = "SELECT message_id, subscription, state, attempts, generation, due_at,
            first_sent_at, sent_at, answered_at, last_error FROM delivery";

pub(super) async fn get(
    db: &mut SqliteConnection,
    producer: String,
    ids: Vec<MessageId>,
) -> Result<Vec<Option<(MessageView, Vec<DeliveryView>)>>, Error> {
    let mut found = Vec::with_capacity(ids.len());
    for id in ids {
        let message = message(db, id)
            .await?
            .filter(|(view, _)| view.producer == producer);
        found.push(match message {
            Some((view, _)) => Some((view, deliveries(db, id).await?)),
            None => None,
        });
    }
    Ok(found)
}

pub(super) async fn undecided(
    db: &mut SqliteConnection,
    producer: String,
    most: u64,
) -> Result<u64, Error> {
    let count: i64 = sqlx::query_scalar(
        "-- undecided of a producer
         SELECT count(*) FROM (SELECT 1 FROM message WHERE producer = ? AND state = 'PREPARED'
                                LIMIT ?)",
    )
    .bind(producer)
    .bind(i64::try_from(most).unwrap_or(i64::MAX))
    .fetch_one(db)
    .await
    .map_err(error("count undecided messages"))?;
    Ok(count.unsigned_abs())
}

/// What the rows of a message take beside its body, with their indexes.
const ROW_BYTES: u64 = 1_000;

/// Counted along the partial indexes of what is open, so that what is finished costs nothing. The
/// sample is of the bodies that came last.
pub(super) async fn backlog_bytes(db: &mut SqliteConnection, now: Timestamp) -> Result<u64, Error> {
    let doing = "measure the backlog";
    let messages: i64 = sqlx::query_scalar(
        "-- the backlog
         SELECT (SELECT count(*) FROM message WHERE state = 'PREPARED')
                + coalesce((SELECT sum(n) FROM (
                      SELECT max(o.n) AS n FROM (
                          SELECT subscription, count(*) AS n FROM delivery
                           WHERE state IN ('PENDING', 'SENT') GROUP BY subscription
                      ) AS o JOIN subscription s ON s.name = o.subscription GROUP BY s.topic
                  )), 0)",
    )
    .fetch_one(&mut *db)
    .await
    .map_err(error(doing))?;
    let bucket = bodies::current(db, now).await.map_err(error(doing))?;
    let body_bytes: f64 = sqlx::query_scalar(AssertSqlSafe(format!(
        "-- a sample of bodies
         SELECT coalesce(avg(length(headers) + length(payload)), 0.0)
           FROM (SELECT headers, payload FROM body_{bucket} ORDER BY rowid DESC LIMIT 100)"
    )))
    .fetch_one(&mut *db)
    .await
    .map_err(error(doing))?;
    // An average of lengths is never negative, and far below what a float cannot hold.
    let each = body_bytes as u64 + ROW_BYTES;
    Ok(messages.unsigned_abs().saturating_mul(each))
}

pub(super) async fn show(
    db: &mut SqliteConnection,
    id: MessageId,
    with_body: bool,
) -> Result<Option<Shown>, Error> {
    let doing = "read a message";
    let Some((message, bucket)) = message(db, id).await? else {
        return Ok(None);
    };
    let deliveries = deliveries(db, id).await?;
    let rows = sqlx::query(
        "-- events of a message
         SELECT at, kind, subscription, detail FROM message_event
          WHERE message_id = ? ORDER BY sequence LIMIT 1000",
    )
    .bind(&id.as_bytes()[..])
    .fetch_all(&mut *db)
    .await
    .map_err(error(doing))?;
    let events = rows
        .iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            Ok(EventView {
                at: columns.time("at")?,
                kind: columns.get("kind")?,
                subscription: columns.get("subscription")?,
                detail: columns.get("detail")?,
            })
        })
        .collect::<Result<_, Error>>()?;
    let body = if with_body {
        let body = bodies::get(db, bucket, id, doing).await?;
        Some((body.headers, body.payload))
    } else {
        None
    };
    Ok(Some(Shown {
        message,
        deliveries,
        events,
        body,
    }))
}

pub(super) async fn counts(db: &mut SqliteConnection) -> Result<Counts, Error> {
    let doing = "count messages";
    let mut counts = Counts::default();
    for row in
        sqlx::query("-- messages by state\nSELECT state, count(*) AS n FROM message GROUP BY state")
            .fetch_all(&mut *db)
            .await
            .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        let n = columns.get::<i64>("n")?.unsigned_abs();
        match MessageState::from_word(columns.get("state")?) {
            Some(MessageState::Prepared) => counts.prepared = n,
            Some(MessageState::Confirmed) => counts.confirmed = n,
            Some(MessageState::Cancelled) => counts.cancelled = n,
            None => counts.unknown += n,
        }
    }
    let row = sqlx::query(
        "-- marked messages
         SELECT coalesce(sum(unresolved), 0) AS unresolved, coalesce(sum(conflict), 0) AS conflict,
                coalesce(sum(unsubscribed), 0) AS unsubscribed
           FROM message WHERE unresolved = 1 OR conflict = 1 OR unsubscribed = 1",
    )
    .fetch_one(&mut *db)
    .await
    .map_err(error(doing))?;
    let columns = Columns::new(&row, doing);
    counts.unresolved = columns.get::<i64>("unresolved")?.unsigned_abs();
    counts.conflict = columns.get::<i64>("conflict")?.unsigned_abs();
    counts.unsubscribed = columns.get::<i64>("unsubscribed")?.unsigned_abs();
    let unknown: i64 = sqlx::query_scalar(
        "-- deliveries in a state of a newer version
         SELECT count(*) FROM delivery
          WHERE state < 'CONSUMED' OR (state > 'CONSUMED' AND state < 'DEAD')
             OR (state > 'DEAD' AND state < 'PENDING') OR (state > 'PENDING' AND state < 'SENT')
             OR (state > 'SENT' AND state < 'SKIPPED') OR state > 'SKIPPED'",
    )
    .fetch_one(&mut *db)
    .await
    .map_err(error(doing))?;
    counts.unknown += unknown.unsigned_abs();
    for row in sqlx::query(
        "-- undecided by producer
         SELECT producer, count(*) AS n FROM message WHERE state = 'PREPARED' GROUP BY producer",
    )
    .fetch_all(&mut *db)
    .await
    .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        counts.producers.push((
            columns.get("producer")?,
            columns.get::<i64>("n")?.unsigned_abs(),
        ));
    }
    counts.subscriptions = subscriptions(db).await?;
    Ok(counts)
}

async fn subscriptions(db: &mut SqliteConnection) -> Result<Vec<SubscriptionCounts>, Error> {
    let doing = "count deliveries";
    let rows = sqlx::query(
        "-- open deliveries by subscription
         SELECT s.name, s.topic, s.active,
                (SELECT count(*) FROM delivery d
                  WHERE d.state = 'PENDING' AND d.subscription = s.name) AS pending,
                (SELECT count(*) FROM delivery d
                  WHERE d.state = 'SENT' AND d.subscription = s.name) AS sent,
                (SELECT count(*) FROM delivery d
                  WHERE d.state = 'DEAD' AND d.subscription = s.name) AS dead,
                (SELECT min(confirmed_at) FROM delivery d
                  WHERE d.subscription = s.name AND d.state IN ('PENDING', 'SENT'))
                    AS oldest_open_at
           FROM subscription s ORDER BY s.name",
    )
    .fetch_all(db)
    .await
    .map_err(error(doing))?;
    rows.iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            Ok(SubscriptionCounts {
                name: columns.get("name")?,
                topic: columns.get("topic")?,
                active: columns.get("active")?,
                pending: columns.get::<i64>("pending")?.unsigned_abs(),
                sent: columns.get::<i64>("sent")?.unsigned_abs(),
                dead: columns.get::<i64>("dead")?.unsigned_abs(),
                oldest_open_at: columns.maybe_time("oldest_open_at")?,
            })
        })
        .collect()
}

pub(super) async fn list_messages(
    db: &mut SqliteConnection,
    filter: MessageFilter,
    after: Option<MessageId>,
    limit: usize,
) -> Result<Vec<MessageView>, Error> {
    let doing = "list messages";
    let (condition, word) = match filter {
        MessageFilter::State(state) => ("state = ?", state.as_str()),
        // The marks share one small index; the second condition names it to the planner.
        MessageFilter::Unresolved => (
            "unresolved = 1 AND (unresolved = 1 OR conflict = 1 OR unsubscribed = 1) AND ? = ''",
            "",
        ),
        MessageFilter::Conflict => (
            "conflict = 1 AND (unresolved = 1 OR conflict = 1 OR unsubscribed = 1) AND ? = ''",
            "",
        ),
        MessageFilter::Unsubscribed => (
            "unsubscribed = 1 AND (unresolved = 1 OR conflict = 1 OR unsubscribed = 1) AND ? = ''",
            "",
        ),
    };
    let sql =
        format!("-- list messages\n{MESSAGE} WHERE {condition} AND id > ? ORDER BY id LIMIT ?");
    let after = after.map_or_else(|| vec![0], |id| id.as_bytes().to_vec());
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(word)
        .bind(after)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(db)
        .await
        .map_err(error(doing))?;
    rows.iter().map(|row| message_view(row, doing)).collect()
}

pub(super) async fn list_deliveries(
    db: &mut SqliteConnection,
    state: DeliveryState,
    subscription: Option<String>,
    after: Option<DeliveryCursor>,
    limit: usize,
) -> Result<Vec<DeliveryView>, Error> {
    let doing = "list deliveries";
    let (after_name, after_id) = match after {
        Some((name, id)) => (name, id.as_bytes().to_vec()),
        None => (String::new(), Vec::new()),
    };
    let only = if subscription.is_some() {
        "AND subscription = ?"
    } else {
        "AND ? = ''"
    };
    let sql = format!(
        "-- list deliveries\n{DELIVERY}
          WHERE state = ? {only} AND (subscription, message_id) > (?, ?)
          ORDER BY subscription, message_id LIMIT ?"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(state.as_str())
        .bind(subscription.unwrap_or_default())
        .bind(after_name)
        .bind(after_id)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(db)
        .await
        .map_err(error(doing))?;
    rows.iter()
        .filter_map(|row| delivery_view(row, doing).transpose())
        .collect()
}

async fn message(
    db: &mut SqliteConnection,
    id: MessageId,
) -> Result<Option<(MessageView, i64)>, Error> {
    let doing = "read a message";
    let sql = format!("-- read a message\n{MESSAGE} WHERE id = ?");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(&id.as_bytes()[..])
        .fetch_optional(db)
        .await
        .map_err(error(doing))?;
    row.map(|row| {
        Ok((
            message_view(&row, doing)?,
            Columns::new(&row, doing).get("bucket")?,
        ))
    })
    .transpose()
}

async fn deliveries(db: &mut SqliteConnection, id: MessageId) -> Result<Vec<DeliveryView>, Error> {
    let doing = "read deliveries";
    let sql = format!(
        "-- deliveries of a message\n{DELIVERY} WHERE message_id = ? ORDER BY subscription"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(&id.as_bytes()[..])
        .fetch_all(db)
        .await
        .map_err(error(doing))?;
    rows.iter()
        .filter_map(|row| delivery_view(row, doing).transpose())
        .collect()
}

fn message_view(row: &SqliteRow, doing: &'static str) -> Result<MessageView, Error> {
    let columns = Columns::new(row, doing);
    let by: Option<&str> = columns.get("decided_by")?;
    Ok(MessageView {
        id: columns.id("id")?,
        producer: columns.get("producer")?,
        topic: columns.get("topic")?,
        key: columns.get("key")?,
        state: state(&columns)?,
        decided_by: by.and_then(DecidedBy::from_word),
        prepared_at: columns.time("prepared_at")?,
        decided_at: columns.maybe_time("decided_at")?,
        checks: columns.count("checks")?,
        check_at: columns.maybe_time("check_at")?,
        unresolved: columns.get("unresolved")?,
        conflict: columns.get("conflict")?,
        unsubscribed: columns.get("unsubscribed")?,
    })
}

/// `None` for a delivery in a state that this version does not know.
fn delivery_view(row: &SqliteRow, doing: &'static str) -> Result<Option<DeliveryView>, Error> {
    let columns = Columns::new(row, doing);
    let Some(state) = DeliveryState::from_word(columns.get("state")?) else {
        return Ok(None);
    };
    Ok(Some(DeliveryView {
        id: columns.id("message_id")?,
        subscription: columns.get("subscription")?,
        state,
        attempts: columns.count("attempts")?,
        generation: columns.count("generation")?,
        due_at: columns.maybe_time("due_at")?,
        first_sent_at: columns.maybe_time("first_sent_at")?,
        sent_at: columns.maybe_time("sent_at")?,
        answered_at: columns.maybe_time("answered_at")?,
        last_error: columns.get::<Option<String>>("last_error")?,
    }))
}
