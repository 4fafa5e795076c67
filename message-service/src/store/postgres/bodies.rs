//! The body buckets: tables of payloads that are only added to and go as a whole.
//!
//! They are plain tables, so that making and dropping one stops nobody. A statement that adds to
//! a bucket repeats that it is not closed; see [`super::retire`] for how one is closed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::recent::Recent;
use super::rows::{at, get, id, uuid, wrong};
use super::session::{Session, Trouble, trouble};
use super::time::At;
use crate::message::{MessageId, Timestamp};

/// Content type, headers and payload of a message.
pub(super) struct Body {
    pub(super) content_type: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) payload: Vec<u8>,
}

/// How long a lane goes on with the bucket it knows. It may be a little behind: any bucket that
/// is not closed will do.
const KNOWN_FOR: Duration = Duration::from_secs(5);

/// How often bodies are looked for again that were carried to another bucket meanwhile.
const LOOKS: u32 = 3;

/// What the lanes that write bodies share.
#[derive(Default)]
pub(super) struct Bodies {
    pub(super) bucket: Current,
    pub(super) recent: Recent,
}

/// The bucket that takes new bodies, as a lane last read it.
#[derive(Default)]
pub(super) struct Current {
    known: Mutex<Option<(i64, Instant)>>,
}

impl Current {
    /// The newest bucket that has opened.
    pub(super) async fn number(&self, db: &mut Session) -> Result<i64, sqlx::Error> {
        let known = *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((number, read)) = known
            && read.elapsed() < KNOWN_FOR
        {
            return Ok(number);
        }
        let number = current(db).await?;
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, Instant::now()));
        Ok(number)
    }

    /// It turned out to be closed.
    pub(super) fn forget(&self) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The bucket that takes new bodies: the newest that has opened, else the first that will.
pub(super) async fn current(db: &mut Session) -> Result<i64, sqlx::Error> {
    let rows = db
        .fetch(
            "-- current bucket
             WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
             SELECT number FROM body_bucket, t WHERE NOT closed
              ORDER BY opens_at <= now DESC, CASE WHEN opens_at <= now THEN -number ELSE number END
              LIMIT 1",
            |query| query,
        )
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    get(row, "number")
}

/// Reads bodies from their buckets. One that is not there is left out, and said.
pub(super) async fn read(
    db: &mut Session,
    wanted: impl IntoIterator<Item = (MessageId, i64)>,
) -> Result<HashMap<MessageId, Body>, sqlx::Error> {
    let mut found = HashMap::new();
    let mut wanted: Vec<_> = wanted.into_iter().collect();
    for look in 1..=LOOKS {
        let mut buckets: BTreeMap<i64, Vec<Uuid>> = BTreeMap::new();
        for (id, bucket) in &wanted {
            buckets.entry(*bucket).or_default().push(uuid(*id));
        }
        for (bucket, ids) in buckets {
            read_bucket(db, bucket, ids, &mut found).await?;
        }
        wanted.retain(|(id, _)| !found.contains_key(id));
        if wanted.is_empty() {
            return Ok(found);
        }
        if look < LOOKS {
            // Retention may have carried them to a newer bucket since they were looked up.
            wanted = look_up(db, &wanted).await?;
        }
    }
    for (id, bucket) in wanted {
        tracing::error!(message.id = %id, bucket, "the body of a message is not in its bucket");
    }
    Ok(found)
}

async fn read_bucket(
    db: &mut Session,
    bucket: i64,
    ids: Vec<Uuid>,
    found: &mut HashMap<MessageId, Body>,
) -> Result<(), sqlx::Error> {
    let sql = format!(
        "-- read bodies\nSELECT message_id, content_type, headers, payload FROM body_{bucket} \
         WHERE message_id = ANY($1)"
    );
    let rows = match db.fetch(&sql, |query| query.bind(&ids)).await {
        Err(error) if trouble(&error) == Trouble::NoSuchTable => return Ok(()),
        rows => rows?,
    };
    for row in &rows {
        let headers: &str = get(row, "headers")?;
        let body = Body {
            content_type: get(row, "content_type")?,
            headers: serde_json::from_str(headers)
                .map_err(|_| wrong("headers", "is not a list of pairs"))?,
            payload: get(row, "payload")?,
        };
        found.insert(id(row, "message_id")?, body);
    }
    Ok(())
}

async fn look_up(
    db: &mut Session,
    wanted: &[(MessageId, i64)],
) -> Result<Vec<(MessageId, i64)>, sqlx::Error> {
    let ids: Vec<_> = wanted.iter().map(|(id, _)| uuid(*id)).collect();
    let rows = db
        .fetch(
            "-- which bucket\nSELECT id, bucket FROM message WHERE id = ANY($1)",
            |query| query.bind(&ids),
        )
        .await?;
    rows.iter()
        .map(|row| Ok((id(row, "id")?, get(row, "bucket")?)))
        .collect()
}

/// Sees to it that the current bucket and two ahead of it exist, and that buckets which were
/// planned with a longer span open sooner, or else a shorter span would only begin to matter
/// after two of the longer ones. None is put off.
pub(super) async fn open_ahead(db: &mut Session, span: Duration) -> Result<(), sqlx::Error> {
    pull_forward(db, span).await?;
    loop {
        let rows = db
            .fetch(
                "-- buckets ahead
                 WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
                 SELECT now, coalesce(max(number), 0) AS last,
                        greatest(max(opens_at) + $1, now) AS next_opens_at,
                        count(*) FILTER (WHERE opens_at > now) AS ahead
                   FROM t LEFT JOIN body_bucket ON true GROUP BY now",
                |query| query.bind(super::time::span(span)),
            )
            .await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        if get::<i64>(row, "ahead")? >= 2 {
            return Ok(());
        }
        create(db, get::<i64>(row, "last")? + 1, at(row, "next_opens_at")?).await?;
    }
}

async fn pull_forward(db: &mut Session, span: Duration) -> Result<(), sqlx::Error> {
    let current = current(db).await;
    let current = match current {
        Err(sqlx::Error::RowNotFound) => return Ok(()),
        current => current?,
    };
    db.fetch(
        "-- open sooner
         WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
         UPDATE body_bucket b
            SET opens_at = least(b.opens_at,
                                 greatest(now, c.opens_at + $2) + (b.number - $1 - 1) * $2)
           FROM t, body_bucket c
          WHERE b.number > $1 AND b.opens_at > now AND c.number = $1
         RETURNING b.number",
        |query| query.bind(current).bind(super::time::span(span)),
    )
    .await?;
    Ok(())
}

/// Makes a bucket, unless somebody else has: two services may open buckets at the same time.
async fn create(db: &mut Session, number: i64, opens_at: Timestamp) -> Result<(), sqlx::Error> {
    db.run(format!(
        "-- open a bucket
         SELECT pg_advisory_xact_lock({BUCKETS_LOCK});
         CREATE TABLE IF NOT EXISTS body_{number} (
             message_id   uuid  NOT NULL PRIMARY KEY,
             content_type text  NOT NULL,
             -- JSON: a list of [name, value].
             headers      text  NOT NULL,
             payload      bytea NOT NULL
         );"
    ))
    .await?;
    db.fetch(
        "-- register a bucket
         INSERT INTO body_bucket (number, opens_at) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        |query| query.bind(number).bind(At(opens_at)),
    )
    .await?;
    Ok(())
}

/// The advisory lock of whoever makes, closes or empties buckets, for one statement each.
pub(super) const BUCKETS_LOCK: i64 = 0x68_61_6e_64_66_61_73_74;
