//! Removing what was finished long ago, bucket by bucket, in slices.
//!
//! A bucket's turn comes when its successor has been open for as long as finished messages are
//! kept. First it is closed: statements that began before are waited for, and later ones see that
//! it is closed, so that it cannot grow any more. Then its messages are walked through: what is
//! finished long enough goes; of what is not, the body is copied to the bucket that takes new
//! ones. At the end the table is dropped, with all bodies that are left in it.
//!
//! Several processes may do this at the same time: every statement repeats what it relies on, so
//! the slower one finds nothing left to do. None holds a lock between two statements.

use std::time::Duration;

use uuid::Uuid;

use super::bodies;
use super::lanes::{Replies, Work};
use super::rows::get;
use super::session::{Session, Trouble, trouble};
use super::time::At;
use super::topology;
use crate::message::Timestamp;
use crate::store::kind::Kind;
use crate::store::{Error, Retired};

/// Messages of one slice; each has a handful of rows.
const SLICE_MESSAGES: i64 = 100;
/// How many looks one slice takes at most that find nothing to do: after a restart, a bucket is
/// walked through from its beginning, past all that was removed before.
const STEPS_OVER_NOTHING: usize = 50;

/// What retention wants.
pub(super) enum Wanted {
    /// Buckets ahead of use, each open for this long.
    Buckets(Duration),
    /// A slice of what was finished before this to go.
    Slice(Timestamp),
}

/// The lane of retention.
#[derive(Default)]
pub(super) struct Retire {
    /// How far a bucket is walked through: its number and the last message.
    walked: Option<(i64, Uuid)>,
}

impl Work for Retire {
    type Call = Wanted;
    type Reply = Retired;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Retire
    }

    fn size(_: &Wanted) -> (usize, usize) {
        (1, 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Wanted],
    ) -> Result<Replies<Retired>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            let retired = match call {
                Wanted::Buckets(span) => {
                    topology::skip_leftovers(db).await?;
                    bodies::open_ahead(db, *span)
                        .await
                        .map(|()| Retired::default())
                }
                Wanted::Slice(cutoff) => self.slice(db, *cutoff).await,
            };
            replies.push(match retired {
                // Somebody reads a table that is to change, or makes the change: next time.
                Err(error) if is_in_use(&error) => {
                    tracing::debug!(%error, "a body bucket is in use");
                    Ok(Retired::default())
                }
                retired => Ok::<_, Error>(retired?),
            });
        }
        Ok(replies)
    }
}

fn is_in_use(error: &sqlx::Error) -> bool {
    match trouble(error) {
        Trouble::Locked | Trouble::NoSuchTable => true,
        Trouble::Repeat | Trouble::Poison | Trouble::Unavailable => false,
    }
}

impl Retire {
    async fn slice(&mut self, db: &mut Session, cutoff: Timestamp) -> Result<Retired, sqlx::Error> {
        let mut retired = Retired::default();
        let Some(bucket) = oldest_due(db, cutoff).await? else {
            return Ok(retired);
        };
        let after = match self.walked {
            Some((walked, last)) if walked == bucket => last,
            // Also if somebody else has closed it: he may still be waiting for its writers.
            _ => {
                close(db, bucket).await?;
                Uuid::nil()
            }
        };
        let current = bodies::current(db).await?;
        let mut slice = look(db, bucket, after, cutoff).await?;
        for _ in 0..STEPS_OVER_NOTHING {
            let Some(last) = slice.last.filter(|_| slice.is_idle()) else {
                break;
            };
            self.walked = Some((bucket, last));
            slice = look(db, bucket, last, cutoff).await?;
        }
        retired.messages = remove(db, bucket, &slice.finished, cutoff).await?;
        retired.moved = carry(db, bucket, current, &slice.unfinished).await?;
        let wanted = slice.finished.len() + slice.unfinished.len();
        let done = retired.messages + retired.moved;
        if usize::try_from(done).unwrap_or(usize::MAX) < wanted {
            // What was locked, or became unfinished meanwhile, is looked at again.
            retired.more = done > 0;
            return Ok(retired);
        }
        match slice.last {
            Some(last) => self.walked = Some((bucket, last)),
            None => {
                drop_bucket(db, bucket).await?;
                self.walked = None;
                retired.buckets = 1;
            }
        }
        retired.more = true;
        Ok(retired)
    }
}

/// The oldest bucket whose successor had opened at the cutoff.
async fn oldest_due(db: &mut Session, cutoff: Timestamp) -> Result<Option<i64>, sqlx::Error> {
    let rows = db
        .fetch(
            "-- the oldest bucket that is due
             SELECT b.number FROM body_bucket b
               JOIN body_bucket next ON next.number = b.number + 1
              WHERE next.opens_at <= $1
                AND b.number < (SELECT max(number) FROM body_bucket
                                 WHERE opens_at <= clock_timestamp())
              ORDER BY b.number LIMIT 1",
            |query| query.bind(At(cutoff)),
        )
        .await?;
    rows.first().map(|row| get(row, "number")).transpose()
}

/// Closes a bucket and waits until nobody writes to it any more. The lock is let go in the same
/// breath; the first statement only makes a transaction of the two, which LOCK asks for.
async fn close(db: &mut Session, bucket: i64) -> Result<(), sqlx::Error> {
    db.fetch(
        "-- close a bucket
         UPDATE body_bucket SET closed = true WHERE number = $1 AND NOT closed",
        |query| query.bind(bucket),
    )
    .await?;
    db.run(format!(
        "-- wait for its writers\nSELECT 1; LOCK TABLE body_{bucket} IN SHARE ROW EXCLUSIVE MODE"
    ))
    .await
}

/// The next messages of a bucket.
#[derive(Default)]
struct Slice {
    finished: Vec<Uuid>,
    unfinished: Vec<Uuid>,
    /// The last message, if there was one.
    last: Option<Uuid>,
}

impl Slice {
    /// Everything in it was removed or carried before.
    fn is_idle(&self) -> bool {
        self.finished.is_empty() && self.unfinished.is_empty()
    }
}

async fn look(
    db: &mut Session,
    bucket: i64,
    after: Uuid,
    cutoff: Timestamp,
) -> Result<Slice, sqlx::Error> {
    let sql = format!(
        "-- a slice of a bucket
         WITH t AS MATERIALIZED (
             SELECT $2::timestamptz AS cutoff
         ), bodies AS MATERIALIZED (
             SELECT message_id FROM body_{bucket} WHERE message_id > $1
              ORDER BY message_id LIMIT {SLICE_MESSAGES}
         )
         SELECT b.message_id, m.bucket = {bucket} AS is_here, {FINISHED} AS finished
           FROM t, bodies b LEFT JOIN message m ON m.id = b.message_id
          ORDER BY b.message_id"
    );
    let rows = db
        .fetch(&sql, |query| query.bind(after).bind(At(cutoff)))
        .await?;
    let mut slice = Slice::default();
    for row in &rows {
        let id: Uuid = get(row, "message_id")?;
        slice.last = Some(id);
        // Removed or carried before.
        if get::<Option<bool>>(row, "is_here")? != Some(true) {
            continue;
        }
        if get(row, "finished")? {
            slice.finished.push(id);
        } else {
            slice.unfinished.push(id);
        }
    }
    Ok(slice)
}

/// Whether message `m` was finished before the cutoff of `t`.
const FINISHED: &str = "(NOT m.conflict AND m.state IN ('CONFIRMED', 'CANCELLED')
             AND m.decided_at < t.cutoff
             AND NOT EXISTS (SELECT FROM delivery d
                              WHERE d.message_id = m.id
                                AND (d.state NOT IN ('CONSUMED', 'SKIPPED')
                                     OR d.answered_at >= t.cutoff)))";

/// Removes messages that are finished still, with all that belongs to them but the body, which
/// goes with its bucket.
async fn remove(
    db: &mut Session,
    bucket: i64,
    ids: &[Uuid],
    cutoff: Timestamp,
) -> Result<u64, sqlx::Error> {
    if ids.is_empty() {
        return Ok(0);
    }
    let sql = format!(
        "-- remove messages
         WITH t AS MATERIALIZED (
             SELECT $2::timestamptz AS cutoff
         ), locked AS MATERIALIZED (
             SELECT m.id FROM message m
              WHERE m.id = ANY($1) AND m.bucket = $3
              ORDER BY m.id FOR UPDATE OF m /* waits */
         ), finished AS MATERIALIZED (
             SELECT m.id FROM t, locked l JOIN message m ON m.id = l.id WHERE {FINISHED}
         ), locked_deliveries AS MATERIALIZED (
             SELECT d.message_id, d.subscription
               FROM finished f JOIN delivery d ON d.message_id = f.id
              ORDER BY d.message_id, d.subscription FOR UPDATE OF d
         ), deliveries AS (
             DELETE FROM delivery d USING locked_deliveries l
              WHERE d.message_id = l.message_id AND d.subscription = l.subscription
         ), events AS (
             DELETE FROM message_event e USING finished f WHERE e.message_id = f.id
         )
         DELETE FROM message m USING finished f WHERE m.id = f.id
         RETURNING m.id"
    );
    let rows = db
        .fetch(&sql, |query| query.bind(ids).bind(At(cutoff)).bind(bucket))
        .await?;
    Ok(rows.len() as u64)
}

/// Copies bodies that are still needed to the bucket that takes new ones.
async fn carry(db: &mut Session, from: i64, to: i64, ids: &[Uuid]) -> Result<u64, sqlx::Error> {
    if ids.is_empty() {
        return Ok(0);
    }
    let sql = format!(
        "-- carry bodies
         WITH locked AS MATERIALIZED (
             SELECT m.id FROM message m
              WHERE m.id = ANY($1) AND m.bucket = {from}
                AND EXISTS (SELECT FROM body_bucket WHERE number = {to} AND NOT closed)
              ORDER BY m.id FOR UPDATE OF m /* waits */
         ), carried AS (
             INSERT INTO body_{to} (message_id, content_type, headers, payload)
             SELECT b.message_id, b.content_type, b.headers, b.payload
               FROM locked l JOIN body_{from} b ON b.message_id = l.id
              ORDER BY b.message_id
             RETURNING message_id
         )
         UPDATE message m SET bucket = {to} FROM carried c WHERE m.id = c.message_id
         RETURNING m.id"
    );
    let rows = db.fetch(&sql, |query| query.bind(ids)).await?;
    Ok(rows.len() as u64)
}

/// Drops a bucket through which was walked to the end.
async fn drop_bucket(db: &mut Session, bucket: i64) -> Result<(), sqlx::Error> {
    db.run(format!(
        "-- drop a bucket
         DROP TABLE IF EXISTS body_{bucket};
         DELETE FROM body_bucket WHERE number = {bucket};"
    ))
    .await
}
