//! Removing what was finished long ago, bucket by bucket, in slices.
//!
//! A bucket's turn comes when its successor has been open for as long as finished messages
//! are kept. Of its messages, what is finished long enough goes; what is not is copied to the
//! bucket that takes new bodies. Once empty, the bucket's table is dropped.

use sqlx::{AssertSqlSafe, Row as _};

use super::bodies;
use super::lists;
use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::{MessageId, Timestamp};
use crate::store::{Error, Retired};

/// Messages of one slice; each has a handful of rows.
const SLICE_MESSAGES: i64 = 100;

pub(super) async fn slice(tx: &mut Tx, (cutoff,): &(Timestamp,)) -> Result<Retired, Error> {
    let doing = Kind::Retire.doing();
    let cutoff = *cutoff;
    let mut retired = Retired::default();
    let current = bodies::current(&mut tx.db, tx.now)
        .await
        .map_err(error(doing))?;
    let Some(bucket) = oldest_due(tx, cutoff, current).await? else {
        return Ok(retired);
    };
    let rows = sqlx::query(
        "-- a slice of a bucket
         SELECT id, (m.conflict = 0
                     AND m.state IN ('CONFIRMED', 'CANCELLED')
                     AND m.decided_at < ?
                     AND NOT EXISTS (SELECT 1 FROM delivery d
                                      WHERE d.message_id = m.id
                                        AND (d.state NOT IN ('CONSUMED', 'SKIPPED')
                                             OR d.answered_at >= ?))) AS finished
           FROM message m WHERE m.bucket = ? ORDER BY m.id LIMIT ?",
    )
    .bind(cutoff.as_micros())
    .bind(cutoff.as_micros())
    .bind(bucket)
    .bind(SLICE_MESSAGES)
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let (mut finished, mut needed) = (Vec::new(), Vec::new());
    for row in &rows {
        let columns = Columns::new(row, doing);
        let id = columns.id("id")?;
        if columns.get("finished")? {
            finished.push(id);
        } else {
            needed.push(id);
        }
    }
    retired.messages += finished.len() as u64;
    retired.moved += needed.len() as u64;
    remove(tx, finished, bucket).await?;
    carry(tx, needed, bucket, current).await?;
    if rows.len() < SLICE_MESSAGES as usize {
        drop_bucket(tx, bucket).await?;
        retired.buckets = 1;
    }
    retired.more = true;
    Ok(retired)
}

/// The oldest bucket whose successor had opened at the cutoff.
async fn oldest_due(tx: &mut Tx, cutoff: Timestamp, current: i64) -> Result<Option<i64>, Error> {
    let row = sqlx::query(
        "-- the oldest bucket that is due
         SELECT number FROM body_bucket b
          WHERE number < ?
            AND EXISTS (SELECT 1 FROM body_bucket next
                         WHERE next.number = b.number + 1 AND next.opens_at <= ?)
          ORDER BY number LIMIT 1",
    )
    .bind(current)
    .bind(cutoff.as_micros())
    .fetch_optional(&mut tx.db)
    .await
    .map_err(error(Kind::Retire.doing()))?;
    row.map(|row| row.try_get("number").map_err(error(Kind::Retire.doing())))
        .transpose()
}

async fn remove(tx: &mut Tx, ids: Vec<MessageId>, bucket: i64) -> Result<(), Error> {
    let ids = lists::ids(ids);
    let bodies = format!("-- remove bodies\nDELETE FROM body_{bucket} WHERE message_id IN");
    for sql in [
        "-- remove events\nDELETE FROM message_event WHERE message_id IN",
        "-- remove deliveries\nDELETE FROM delivery WHERE message_id IN",
        &bodies,
        "-- remove messages\nDELETE FROM message WHERE id IN",
    ] {
        run(tx, sql, &ids).await?;
    }
    Ok(())
}

/// Copies bodies that are still needed to the bucket that takes new ones.
async fn carry(tx: &mut Tx, ids: Vec<MessageId>, from: i64, to: i64) -> Result<(), Error> {
    let ids = lists::ids(ids);
    let copy = format!(
        "-- carry bodies
         INSERT INTO body_{to} (message_id, content_type, headers, payload)
         SELECT message_id, content_type, headers, payload FROM body_{from} WHERE message_id IN"
    );
    run(tx, &copy, &ids).await?;
    let repoint = format!("-- point to the copies\nUPDATE message SET bucket = {to} WHERE id IN");
    run(tx, &repoint, &ids).await?;
    let bodies = format!("-- remove bodies\nDELETE FROM body_{from} WHERE message_id IN");
    run(tx, &bodies, &ids).await
}

async fn drop_bucket(tx: &mut Tx, bucket: i64) -> Result<(), Error> {
    let doing = Kind::Retire.doing();
    sqlx::query(AssertSqlSafe(format!("DROP TABLE IF EXISTS body_{bucket}")))
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    sqlx::query("-- forget a bucket\nDELETE FROM body_bucket WHERE number = ?")
        .bind(bucket)
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    Ok(())
}

/// Runs a statement that ends where the list of its messages belongs.
async fn run(tx: &mut Tx, sql: &str, ids: &str) -> Result<(), Error> {
    let sql = format!("{sql} (SELECT unhex(value) FROM json_each(?1))");
    sqlx::query(AssertSqlSafe(sql))
        .bind(ids)
        .execute(&mut tx.db)
        .await
        .map_err(error(Kind::Retire.doing()))?;
    Ok(())
}
