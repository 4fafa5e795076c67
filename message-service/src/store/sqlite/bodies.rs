//! The body buckets: tables of payloads that are only added to and go as a whole.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Row as _};

use super::lists;
use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::{MessageId, NewMessage, Timestamp};
use crate::store::Error;

/// Content type, headers and payload of a message.
pub(super) struct Body {
    pub(super) content_type: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) payload: Vec<u8>,
}

impl Body {
    pub(super) fn bytes(&self) -> usize {
        self.payload.len()
            + self
                .headers
                .iter()
                .map(|(n, v)| n.len() + v.len())
                .sum::<usize>()
    }
}

/// The bucket that takes new bodies: the newest that has opened.
pub(super) async fn current(db: &mut SqliteConnection, now: Timestamp) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "-- current bucket
         SELECT number FROM body_bucket
          ORDER BY opens_at <= ? DESC, CASE WHEN opens_at <= ? THEN -number ELSE number END
          LIMIT 1",
    )
    .bind(now.as_micros())
    .bind(now.as_micros())
    .fetch_one(db)
    .await
}

/// Puts the bodies of messages into a bucket.
pub(super) async fn put(
    db: &mut SqliteConnection,
    bucket: i64,
    messages: &[&NewMessage],
) -> Result<(), sqlx::Error> {
    // JSON holds no bytes, so the payloads go beside it, one behind the other.
    let mut payloads = Vec::with_capacity(messages.iter().map(|m| m.payload.len()).sum());
    let mut list = Vec::with_capacity(messages.len());
    for message in messages {
        let headers = serde_json::to_string(&message.headers)
            .map_err(|source| sqlx::Error::Encode(Box::new(source)))?;
        list.push((
            lists::hex(message.id.as_bytes()),
            &message.content_type,
            headers,
            // SQLite counts from 1.
            payloads.len() + 1,
            message.payload.len(),
        ));
        payloads.extend_from_slice(&message.payload);
    }
    // `substr` of no bytes at all is NULL.
    let sql = format!(
        "-- put bodies
         INSERT INTO body_{bucket} (message_id, content_type, headers, payload)
         WITH list AS MATERIALIZED (SELECT value AS body FROM json_each(?1))
         SELECT unhex(body ->> 0), body ->> 1, body ->> 2,
                coalesce(substr(?2, body ->> 3, body ->> 4), x'')
           FROM list"
    );
    sqlx::query(AssertSqlSafe(sql))
        .bind(lists::rows(&list)?)
        .bind(payloads)
        .execute(db)
        .await?;
    Ok(())
}

/// Reads bodies from a bucket, in order, as many as there are within `max_bytes`, but at least
/// `at_least` of them.
pub(super) async fn read(
    db: &mut SqliteConnection,
    bucket: i64,
    ids: &[MessageId],
    max_bytes: usize,
    at_least: usize,
    doing: &'static str,
) -> Result<Vec<Body>, Error> {
    // What does not fit is measured, which reads no payload, but is not read.
    let sql = format!(
        "-- read bodies
         WITH measured AS MATERIALIZED (
             SELECT w.key AS place, b.rowid AS body,
                    sum(octet_length(b.headers) + octet_length(b.payload))
                        OVER (ORDER BY w.key) AS bytes
               FROM json_each(?1) w CROSS JOIN body_{bucket} b ON b.message_id = unhex(w.value))
         SELECT place, content_type, headers, payload
           FROM measured CROSS JOIN body_{bucket} b ON b.rowid = measured.body
          WHERE bytes <= ?2 OR place < ?3"
    );
    let mut rows = sqlx::query(AssertSqlSafe(sql))
        .bind(lists::ids(ids.iter().copied()))
        .bind(i64::try_from(max_bytes).unwrap_or(i64::MAX))
        .bind(i64::try_from(at_least).unwrap_or(i64::MAX))
        .fetch_all(db)
        .await
        .map_err(error(doing))?
        .iter()
        .map(|row| {
            let columns = Columns::new(row, doing);
            let headers: &str = columns.get("headers")?;
            let body = Body {
                content_type: columns.get("content_type")?,
                headers: serde_json::from_str(headers)
                    .map_err(|_| columns.wrong("headers", "is not a list of pairs"))?,
                payload: columns.get("payload")?,
            };
            Ok((columns.get::<i64>("place")?, body))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    rows.sort_unstable_by_key(|(place, _)| *place);
    let there = rows
        .iter()
        .zip(0..)
        .take_while(|((place, _), at)| place == at);
    let there = there.count();
    if there < rows.len().max(at_least.min(ids.len())) {
        return Err(missing(bucket, ids[there], doing));
    }
    Ok(rows.into_iter().map(|(_, body)| body).collect())
}

/// Reads the body of one message.
pub(super) async fn get(
    db: &mut SqliteConnection,
    bucket: i64,
    id: MessageId,
    doing: &'static str,
) -> Result<Body, Error> {
    let mut bodies = read(db, bucket, &[id], usize::MAX, 1, doing).await?;
    bodies.pop().ok_or_else(|| missing(bucket, id, doing))
}

fn missing(bucket: i64, id: MessageId, doing: &'static str) -> Error {
    Error::Inconsistent {
        doing,
        what: format!("body_{bucket} has no body of message {id}"),
    }
}

/// Sees to it that the current bucket and two ahead of it exist.
pub(super) async fn open_ahead(tx: &mut Tx, (span,): &(Duration,)) -> Result<(), Error> {
    let now = tx.now;
    let doing = Kind::Retire.doing();
    pull_forward(&mut tx.db, now, *span)
        .await
        .map_err(error(doing))?;
    ensure(&mut tx.db, now, *span).await.map_err(error(doing))
}

/// Lets buckets that were planned with a longer span open sooner, or else a shorter span would
/// only begin to matter after two of the longer ones. None is put off.
async fn pull_forward(
    db: &mut SqliteConnection,
    now: Timestamp,
    span: Duration,
) -> Result<(), sqlx::Error> {
    let current = current(db, now).await?;
    sqlx::query(
        "-- open sooner
         UPDATE body_bucket
            SET opens_at = min(opens_at,
                               max(?1, ?2 + (SELECT opens_at FROM body_bucket WHERE number = ?3))
                               + (number - ?3 - 1) * ?2)
          WHERE number > ?3 AND opens_at > ?1",
    )
    .bind(now.as_micros())
    .bind(i64::try_from(span.as_micros()).unwrap_or(i64::MAX))
    .bind(current)
    .execute(db)
    .await?;
    Ok(())
}

/// As [`open_ahead`], outside of the writer: at the start.
pub(super) async fn ensure(
    db: &mut SqliteConnection,
    now: Timestamp,
    span: Duration,
) -> Result<(), sqlx::Error> {
    loop {
        let row = sqlx::query(
            "-- buckets ahead
             SELECT coalesce(max(number), 0) AS last, max(opens_at) AS opens_at,
                    coalesce(sum(opens_at > ?), 0) AS ahead
               FROM body_bucket",
        )
        .bind(now.as_micros())
        .fetch_one(&mut *db)
        .await?;
        let (last, ahead): (i64, i64) = (row.try_get("last")?, row.try_get("ahead")?);
        let opened: Option<i64> = row.try_get("opens_at")?;
        let opens_at = match opened {
            // After a long stop the next bucket opens now, not in the past.
            Some(opened) => Timestamp::from_micros(opened).after(span).max(now),
            None => now,
        };
        if ahead >= 2 {
            return Ok(());
        }
        create(db, last + 1, opens_at).await?;
    }
}

async fn create(
    db: &mut SqliteConnection,
    number: i64,
    opens_at: Timestamp,
) -> Result<(), sqlx::Error> {
    let sql = format!(
        "CREATE TABLE IF NOT EXISTS body_{number} (
             message_id   BLOB NOT NULL PRIMARY KEY CHECK (length(message_id) = 16),
             content_type TEXT NOT NULL,
             -- JSON: a list of [name, value].
             headers      TEXT NOT NULL,
             payload      BLOB NOT NULL
         )"
    );
    sqlx::query(AssertSqlSafe(sql)).execute(&mut *db).await?;
    sqlx::query("-- register a bucket\nINSERT INTO body_bucket (number, opens_at) VALUES (?, ?)")
        .bind(number)
        .bind(opens_at.as_micros())
        .execute(db)
        .await?;
    Ok(())
}
