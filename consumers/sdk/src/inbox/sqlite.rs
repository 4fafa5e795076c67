//! The inbox in SQLite.

use std::time::Duration;

use handfast_migrations::Owner;
use sqlx::{Row as _, Sqlite, SqliteConnection};
use uuid::Uuid;

use super::{InboxDatabase, Seal, Seen};
use crate::error::Error;

/// The primary code of what a constraint, or a trigger, refused.
const CONSTRAINT: u32 = 19;
/// Its extended code that says that a commit hook refused: the seal's, for an earlier reason.
const CONSTRAINT_COMMITHOOK: u32 = 531;

impl InboxDatabase for Sqlite {
    // SQLite has one writer at a time: a second transaction would only wait for the first.
    const CONCURRENCY: usize = 1;

    // IMMEDIATE, because a transaction that turns from reader into writer half-way fails at
    // once when another has written meanwhile.
    // How long it waits for the lock is the pool's `busy_timeout`.
    fn begin(_wait: Duration, _handler_timeout: Duration) -> String {
        "BEGIN IMMEDIATE".to_owned()
    }

    // A full or failing disk, a conflict that says ROLLBACK, and the handler itself can end the
    // transaction half-way. Each later statement would begin and commit one of its own.
    async fn seal(connection: &mut SqliteConnection, seal: &Seal) -> Result<(), sqlx::Error> {
        let (at_commit, at_rollback) = (seal.clone(), seal.clone());
        let mut handle = connection.lock_handle().await?;
        handle.set_commit_hook(move || at_commit.lets_commit());
        handle.set_rollback_hook(move || at_rollback.lose());
        Ok(())
    }

    async fn unseal(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let mut handle = connection.lock_handle().await?;
        handle.remove_commit_hook();
        handle.remove_rollback_hook();
        Ok(())
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
        seal: &Seal,
    ) -> Result<Option<&'static str>, sqlx::Error> {
        // Most statements that fail leave the transaction as it was before them; not all.
        let lost = "the transaction was rolled back, but the handler said CONSUMED";
        Ok(seal.is_lost().then_some(lost))
    }

    // It may, and the seal refuses every commit of what it writes.
    fn went_on(_connection: &SqliteConnection) -> bool {
        false
    }

    fn is_about_data(code: &str) -> bool {
        code.parse().is_ok_and(|code: u32| {
            // The low byte of an extended code is the primary one.
            code & 0xff == CONSTRAINT && code != CONSTRAINT_COMMITHOOK
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_schema_refuses_is_about_the_data() {
        // Not further said, by a foreign key, by a trigger, by a unique key.
        for code in ["19", "787", "1811", "2067"] {
            assert!(Sqlite::is_about_data(code), "{code}");
        }
        // Busy, an I/O error, a full disk, the seal.
        for code in ["5", "10", "13", "531", ""] {
            assert!(!Sqlite::is_about_data(code), "{code}");
        }
    }
}
