//! The inbox in SQLite.

use std::time::Duration;

use handfast_migrations::Owner;
use sqlx::{Row as _, Sqlite, SqliteConnection};
use uuid::Uuid;

use super::{InboxDatabase, Seen};
use crate::error::Error;

impl InboxDatabase for Sqlite {
    // SQLite has one writer at a time: a second transaction would only wait for the first.
    const CONCURRENCY: usize = 1;

    // IMMEDIATE, because a transaction that turns from reader into writer half-way fails at
    // once when another has written meanwhile.
    // How long it waits for the lock is the pool's `busy_timeout`.
    fn begin(_wait: Duration) -> String {
        "BEGIN IMMEDIATE".to_owned()
    }

    async fn migrate(connection: &mut SqliteConnection) -> Result<(), Error> {
        Owner::Inbox.apply(connection).await?;
        Ok(())
    }

    async fn check_durable(connection: &mut SqliteConnection) -> Result<(), Error> {
        let read = |source| Error::Database {
            doing: "read the settings of",
            source,
        };
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous")
            .fetch_one(&mut *connection)
            .await
            .map_err(read)?;
        if synchronous < 2 {
            return Err(Error::NotDurable {
                setting: "synchronous",
                found: if synchronous == 0 { "OFF" } else { "NORMAL" }.to_owned(),
                wanted: "FULL",
            });
        }
        let journal_mode: String = sqlx::query_scalar("PRAGMA journal_mode")
            .fetch_one(&mut *connection)
            .await
            .map_err(read)?;
        if ["off", "memory"].contains(&journal_mode.as_str()) {
            return Err(Error::NotDurable {
                setting: "journal_mode",
                found: journal_mode.to_ascii_uppercase(),
                wanted: "WAL",
            });
        }
        Ok(())
    }

    async fn record(
        connection: &mut SqliteConnection,
        subscription: &str,
        ids: &[Uuid],
    ) -> Result<Vec<Seen>, sqlx::Error> {
        let rows = sqlx::query(
            r#"
            -- record
            INSERT INTO handfast_inbox (subscription, message_id, at)
            SELECT ?1, unhex(value), CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)
              FROM json_each(?2)
             WHERE true -- without it SQLite takes ON CONFLICT for a join's ON
                ON CONFLICT DO UPDATE SET seen = seen + 1
         RETURNING message_id, seen, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)
            "#,
        )
        .bind(subscription)
        .bind(json_array(ids))
        .fetch_all(connection)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Seen {
                    message_id: uuid(row.try_get(0)?)?,
                    times: row.try_get(1)?,
                    now: row.try_get(2)?,
                })
            })
            .collect()
    }

    async fn refuses_commit(
        _connection: &mut SqliteConnection,
    ) -> Result<Option<&'static str>, sqlx::Error> {
        // A statement that failed leaves the transaction as it was before it.
        Ok(None)
    }

    async fn now(connection: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("SELECT CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)")
            .fetch_one(connection)
            .await
    }

    async fn prune(
        connection: &mut SqliteConnection,
        subscription: &str,
        before: i64,
        limit_rows: u32,
    ) -> Result<u64, sqlx::Error> {
        let done = sqlx::query(
            r#"
            -- prune
            DELETE FROM handfast_inbox
             WHERE (subscription, message_id) IN (
                   SELECT subscription, message_id
                     FROM handfast_inbox
                    WHERE at < ?2
                      AND subscription = ?1 -- another consumer may remember longer
                    ORDER BY at
                    LIMIT ?3)
            "#,
        )
        .bind(subscription)
        .bind(before)
        .bind(limit_rows)
        .execute(connection)
        .await?;
        Ok(done.rows_affected())
    }
}

/// The ids as `["00ff…", …]`: one parameter for a batch of any size, so that the statement is
/// prepared once.
fn json_array(ids: &[Uuid]) -> String {
    let list: Vec<String> = ids
        .iter()
        .map(|id| format!("\"{}\"", id.simple()))
        .collect();
    format!("[{}]", list.join(","))
}

fn uuid(bytes: Vec<u8>) -> Result<Uuid, sqlx::Error> {
    Uuid::from_slice(&bytes).map_err(|error| sqlx::Error::Decode(error.into()))
}
