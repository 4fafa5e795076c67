//! What people and producers look at.

use std::collections::HashMap;

use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::bodies;
use super::rows::{at, count, delivery_state, get, id, long, many, maybe_at, uuid, wrong};
use super::session::Session;
use crate::message::{DeliveryState, MessageId, MessageState};
use crate::store::{
    Counts, DecidedBy, DeliveryCursor, DeliveryView, EventView, MessageFilter, MessageView, Shown,
    SubscriptionCounts,
};

const MESSAGE: &str = "SELECT id, producer, topic, key, state, decided_by, prepared_at, decided_at,
            checks, check_at, unresolved, conflict, unsubscribed, bucket FROM message";
const DELIVERY: &str = "SELECT message_id, subscription, state, attempts, generation, due_at,
            first_sent_at, sent_at, answered_at, last_error FROM delivery";
/// Lines of a timeline that are shown at most.
const MOST_EVENTS: i64 = 1_000;

/// A message and its deliveries.
type Got = (MessageView, Vec<DeliveryView>);

pub(super) async fn get_many(
    db: &mut Session,
    producer: &str,
    ids: &[MessageId],
) -> Result<Vec<Option<Got>>, sqlx::Error> {
    let wanted: Vec<Uuid> = ids.iter().copied().map(uuid).collect();
    let sql = format!("-- read messages\n{MESSAGE} WHERE id = ANY($1) AND producer = $2");
    let rows = db
        .fetch(&sql, |query| query.bind(&wanted).bind(producer))
        .await?;
    let mut found: HashMap<MessageId, Got> = HashMap::with_capacity(rows.len());
    for row in &rows {
        let view = message_view(row)?;
        found.insert(view.id, (view, Vec::new()));
    }
    for delivery in deliveries(db, &wanted).await? {
        if let Some((_, deliveries)) = found.get_mut(&delivery.id) {
            deliveries.push(delivery);
        }
    }
    Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
}

pub(super) async fn undecided(
    db: &mut Session,
    producer: &str,
    most: u64,
) -> Result<u64, sqlx::Error> {
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let rows = db
        .fetch(
            "-- undecided of a producer
             SELECT count(*) AS n FROM (SELECT FROM message
                                         WHERE producer = $1 AND state = 'PREPARED' LIMIT $2) AS m",
            |query| query.bind(producer).bind(most),
        )
        .await?;
    many(rows.first().ok_or(sqlx::Error::RowNotFound)?, "n")
}

/// What the rows of a message take beside its body, with their indexes.
const ROW_BYTES: u64 = 1_000;

/// Counted along the partial indexes of what is open, so that what is finished costs nothing.
pub(super) async fn backlog_bytes(db: &mut Session) -> Result<u64, sqlx::Error> {
    let rows = db
        .fetch(
            "-- the backlog
             WITH open AS (
                 SELECT subscription, sum(n) AS n FROM (
                     SELECT subscription, count(*) AS n FROM delivery
                      WHERE state = 'PENDING' AND stream_ends = 0 GROUP BY subscription
                     UNION ALL
                     SELECT subscription, count(*) FROM delivery
                      WHERE state = 'PENDING' AND stream_ends > 0 GROUP BY subscription
                     UNION ALL
                     SELECT subscription, count(*) FROM delivery
                      WHERE state = 'SENT' GROUP BY subscription
                 ) AS kinds GROUP BY subscription
             ), topics AS (
                 SELECT max(o.n) AS n FROM open o JOIN subscription s ON s.name = o.subscription
                  GROUP BY s.topic
             ), sample AS (
                 SELECT m.body_bytes FROM subscription s CROSS JOIN LATERAL (
                     (SELECT message_id FROM delivery d WHERE d.subscription = s.name
                         AND d.state = 'PENDING' AND d.stream_ends = 0 LIMIT 100)
                     UNION ALL
                     (SELECT message_id FROM delivery d WHERE d.subscription = s.name
                         AND d.state = 'SENT' LIMIT 100)
                 ) AS d JOIN message m ON m.id = d.message_id
                 UNION ALL
                 (SELECT body_bytes FROM message WHERE state = 'PREPARED' LIMIT 100)
             )
             SELECT coalesce((SELECT sum(n) FROM topics), 0)::bigint
                    + (SELECT count(*) FROM message WHERE state = 'PREPARED') AS messages,
                    coalesce((SELECT avg(body_bytes) FROM sample), 0)::bigint AS body_bytes",
            |query| query,
        )
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let each = many(row, "body_bytes")? + ROW_BYTES;
    Ok(many(row, "messages")?.saturating_mul(each))
}

pub(super) async fn show(
    db: &mut Session,
    wanted: MessageId,
    with_body: bool,
) -> Result<Option<Shown>, sqlx::Error> {
    let sql = format!("-- read a message\n{MESSAGE} WHERE id = $1");
    let rows = db.fetch(&sql, |query| query.bind(uuid(wanted))).await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    let message = message_view(row)?;
    let bucket = get(row, "bucket")?;
    let deliveries = deliveries(db, &[uuid(wanted)]).await?;
    let events = db
        .fetch(
            "-- events of a message
             SELECT at, kind, subscription, detail FROM message_event
              WHERE message_id = $1 ORDER BY sequence LIMIT $2",
            |query| query.bind(uuid(wanted)).bind(MOST_EVENTS),
        )
        .await?
        .iter()
        .map(|row| {
            Ok(EventView {
                at: at(row, "at")?,
                kind: get(row, "kind")?,
                subscription: get(row, "subscription")?,
                detail: get(row, "detail")?,
            })
        })
        .collect::<Result<_, sqlx::Error>>()?;
    let body = if with_body {
        let body = bodies::read(db, [(wanted, bucket)]).await?.remove(&wanted);
        let body = body.ok_or_else(|| wrong("bucket", "names a bucket without this body"))?;
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

pub(super) async fn counts(db: &mut Session) -> Result<Counts, sqlx::Error> {
    let rows = db
        .fetch(
            "-- count messages
             SELECT count(*) FILTER (WHERE state = 'PREPARED') AS prepared,
                    count(*) FILTER (WHERE state = 'CONFIRMED') AS confirmed,
                    count(*) FILTER (WHERE state = 'CANCELLED') AS cancelled,
                    count(*) FILTER (WHERE state NOT IN ('PREPARED', 'CONFIRMED', 'CANCELLED'))
                    + (SELECT count(*) FROM delivery
                        WHERE state NOT IN ('PENDING', 'SENT', 'CONSUMED', 'DEAD', 'SKIPPED'))
                        AS unknown
               FROM message",
            |query| query,
        )
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let mut counts = Counts {
        prepared: many(row, "prepared")?,
        confirmed: many(row, "confirmed")?,
        cancelled: many(row, "cancelled")?,
        unknown: many(row, "unknown")?,
        ..Counts::default()
    };
    let rows = db
        .fetch(
            "-- count marked messages
             SELECT count(*) FILTER (WHERE unresolved) AS unresolved,
                    count(*) FILTER (WHERE conflict) AS conflict,
                    count(*) FILTER (WHERE unsubscribed) AS unsubscribed
               FROM message WHERE unresolved OR conflict OR unsubscribed",
            |query| query,
        )
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    counts.unresolved = many(row, "unresolved")?;
    counts.conflict = many(row, "conflict")?;
    counts.unsubscribed = many(row, "unsubscribed")?;
    counts.producers = db
        .fetch(
            "-- undecided by producer
             SELECT producer, count(*) AS n FROM message WHERE state = 'PREPARED'
              GROUP BY producer ORDER BY producer",
            |query| query,
        )
        .await?
        .iter()
        .map(|row| Ok((get(row, "producer")?, many(row, "n")?)))
        .collect::<Result<_, sqlx::Error>>()?;
    counts.subscriptions = subscriptions(db).await?;
    Ok(counts)
}

async fn subscriptions(db: &mut Session) -> Result<Vec<SubscriptionCounts>, sqlx::Error> {
    let rows = db
        .fetch(
            "-- open deliveries by subscription
             SELECT s.name, s.topic, s.active, coalesce(p.n, 0) + coalesce(a.n, 0) AS pending,
                    coalesce(t.n, 0) AS sent, coalesce(x.n, 0) AS dead,
                    least(p.oldest, a.oldest, t.oldest) AS oldest_open_at
               FROM subscription s
               LEFT JOIN (SELECT subscription, count(*) AS n, min(confirmed_at) AS oldest
                            FROM delivery WHERE state = 'PENDING' AND stream_ends = 0
                           GROUP BY subscription) AS p ON p.subscription = s.name
               LEFT JOIN (SELECT subscription, count(*) AS n, min(confirmed_at) AS oldest
                            FROM delivery WHERE state = 'PENDING' AND stream_ends > 0
                           GROUP BY subscription) AS a ON a.subscription = s.name
               LEFT JOIN (SELECT subscription, count(*) AS n, min(confirmed_at) AS oldest
                            FROM delivery WHERE state = 'SENT'
                           GROUP BY subscription) AS t ON t.subscription = s.name
               LEFT JOIN (SELECT subscription, count(*) AS n FROM delivery WHERE state = 'DEAD'
                           GROUP BY subscription) AS x ON x.subscription = s.name
              ORDER BY s.name",
            |query| query,
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(SubscriptionCounts {
                name: get(row, "name")?,
                topic: get(row, "topic")?,
                active: get(row, "active")?,
                pending: many(row, "pending")?,
                sent: many(row, "sent")?,
                dead: many(row, "dead")?,
                oldest_open_at: maybe_at(row, "oldest_open_at")?,
            })
        })
        .collect()
}

pub(super) async fn list_messages(
    db: &mut Session,
    filter: MessageFilter,
    after: Option<MessageId>,
    limit: usize,
) -> Result<Vec<MessageView>, sqlx::Error> {
    // Each condition names the small index to the planner.
    let condition = match filter {
        MessageFilter::State(MessageState::Prepared) => "state = 'PREPARED'",
        MessageFilter::State(MessageState::Confirmed) => "state = 'CONFIRMED'",
        MessageFilter::State(MessageState::Cancelled) => "state = 'CANCELLED'",
        MessageFilter::Unresolved => "unresolved AND (unresolved OR conflict OR unsubscribed)",
        MessageFilter::Conflict => "conflict AND (unresolved OR conflict OR unsubscribed)",
        MessageFilter::Unsubscribed => "unsubscribed AND (unresolved OR conflict OR unsubscribed)",
    };
    let sql = format!(
        "-- list messages
         {MESSAGE} WHERE {condition} AND state IN ('PREPARED', 'CONFIRMED', 'CANCELLED')
            AND ($1::uuid IS NULL OR id > $1) ORDER BY id LIMIT $2"
    );
    let rows = db
        .fetch(&sql, |query| query.bind(after.map(uuid)).bind(long(limit)))
        .await?;
    rows.iter().map(message_view).collect()
}

/// Goes from subscription to subscription, because no index leads from a state through all.
pub(super) async fn list_deliveries(
    db: &mut Session,
    state: DeliveryState,
    subscription: Option<&str>,
    after: Option<&DeliveryCursor>,
    limit: usize,
) -> Result<Vec<DeliveryView>, sqlx::Error> {
    let names = db
        .fetch(
            "-- subscriptions from here on
             SELECT name FROM subscription WHERE name >= $1 AND ($2::text IS NULL OR name = $2)
              ORDER BY name",
            |query| {
                query
                    .bind(after.map_or("", |(name, _)| name))
                    .bind(subscription)
            },
        )
        .await?;
    let mut listed = Vec::new();
    for row in &names {
        let name: &str = get(row, "name")?;
        let after = after.filter(|(first, _)| first == name).map(|(_, id)| *id);
        listed.extend(list_of(db, state, name, after, limit - listed.len()).await?);
        if listed.len() >= limit {
            break;
        }
    }
    Ok(listed)
}

async fn list_of(
    db: &mut Session,
    state: DeliveryState,
    subscription: &str,
    after: Option<MessageId>,
    limit: usize,
) -> Result<Vec<DeliveryView>, sqlx::Error> {
    // The word is part of the text, so that the planner sees which index is meant.
    let sql = format!(
        "-- list deliveries
         {DELIVERY} WHERE state = '{state}' AND subscription = $1
            AND ($2::uuid IS NULL OR message_id > $2) ORDER BY message_id LIMIT $3"
    );
    let rows = db
        .fetch(&sql, |query| {
            query
                .bind(subscription)
                .bind(after.map(uuid))
                .bind(long(limit))
        })
        .await?;
    rows.iter()
        .filter_map(|row| delivery_view(row).transpose())
        .collect()
}

async fn deliveries(db: &mut Session, ids: &[Uuid]) -> Result<Vec<DeliveryView>, sqlx::Error> {
    let sql = format!(
        "-- deliveries of messages\n{DELIVERY} WHERE message_id = ANY($1)
          ORDER BY message_id, subscription"
    );
    let rows = db.fetch(&sql, |query| query.bind(ids)).await?;
    rows.iter()
        .filter_map(|row| delivery_view(row).transpose())
        .collect()
}

fn message_view(row: &PgRow) -> Result<MessageView, sqlx::Error> {
    let by: Option<&str> = get(row, "decided_by")?;
    let word: &str = get(row, "state")?;
    let state = MessageState::from_word(word).ok_or_else(|| {
        wrong(
            "state",
            &format!("is {word}, which this version does not know"),
        )
    })?;
    Ok(MessageView {
        id: id(row, "id")?,
        producer: get(row, "producer")?,
        topic: get(row, "topic")?,
        key: get(row, "key")?,
        state,
        decided_by: by.and_then(DecidedBy::from_word),
        prepared_at: at(row, "prepared_at")?,
        decided_at: maybe_at(row, "decided_at")?,
        checks: count(row, "checks")?,
        check_at: maybe_at(row, "check_at")?,
        unresolved: get(row, "unresolved")?,
        conflict: get(row, "conflict")?,
        unsubscribed: get(row, "unsubscribed")?,
    })
}

/// `None` for a delivery in a state that this version does not know.
fn delivery_view(row: &PgRow) -> Result<Option<DeliveryView>, sqlx::Error> {
    let Some(state) = delivery_state(row)? else {
        return Ok(None);
    };
    Ok(Some(DeliveryView {
        id: id(row, "message_id")?,
        subscription: get(row, "subscription")?,
        state,
        attempts: count(row, "attempts")?,
        generation: count(row, "generation")?,
        due_at: maybe_at(row, "due_at")?,
        first_sent_at: maybe_at(row, "first_sent_at")?,
        sent_at: maybe_at(row, "sent_at")?,
        answered_at: maybe_at(row, "answered_at")?,
        last_error: get(row, "last_error")?,
    }))
}
