//! The fence in an SQLite file.
//!
//! Every transaction begins IMMEDIATE: a deferred one would find out at its first write that
//! another was faster, and could not wait.
//!
//! After some errors, such as a full disk, SQLite rolls the whole transaction back by itself,
//! and each statement from there on commits by itself. So a commit hook refuses every commit
//! while the business runs, and the SDK's own COMMIT comes only if the fence row is still there.

use std::time::Duration;

use handfast_migrations::Owner;
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqliteConnection};
use sqlx::{Pool, SqlitePool};
use uuid::Uuid;

use super::{FenceDatabase, FenceError, FenceIdentity, FenceVerdict, read, verdict};

/// Longer than this a status check does not wait for the business's lock.
const CHECK_LOCK_WAIT: Duration = Duration::from_millis(200);

/// `synchronous = FULL`; EXTRA is above it.
const SYNCHRONOUS_FULL: i64 = 2;

impl FenceDatabase for Sqlite {
    const BEGIN: &'static str = "BEGIN IMMEDIATE";
    const BEGIN_CHECK: &'static str = "BEGIN IMMEDIATE";

    async fn migrate(pool: &SqlitePool) -> Result<(), FenceError> {
        let mut connection = pool.acquire().await.map_err(read)?;
        Owner::Fence.apply(&mut *connection).await?;
        Ok(())
    }

    async fn identity(pool: &SqlitePool) -> Result<FenceIdentity, FenceError> {
        let mut connection = pool.acquire().await.map_err(read)?;
        refuse_if_not_durable(&mut connection).await?;
        let bytes: Vec<u8> =
            sqlx::query_scalar("SELECT identity FROM handfast_fence_identity WHERE one = 1")
                .fetch_one(&mut *connection)
                .await
                .map_err(|source| match &source {
                    sqlx::Error::Database(error) if error.message().contains("no such table") => {
                        FenceError::Missing { source }
                    }
                    sqlx::Error::RowNotFound => FenceError::Missing { source },
                    _ => read(source),
                })?;
        let bytes = <[u8; 16]>::try_from(bytes).map_err(|_| FenceError::Missing {
            source: sqlx::Error::RowNotFound,
        })?;
        Ok(FenceIdentity::from_bytes(bytes))
    }

    fn check_options(pool: &SqlitePool) -> SqliteConnectOptions {
        (*pool.connect_options())
            .clone()
            .create_if_missing(false)
            .busy_timeout(CHECK_LOCK_WAIT)
    }

    async fn hold(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        connection.lock_handle().await?.set_commit_hook(|| false);
        Ok(())
    }

    async fn release(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        connection.lock_handle().await?.remove_commit_hook();
        Ok(())
    }

    async fn has_ended(connection: &mut SqliteConnection, id: Uuid) -> Result<bool, sqlx::Error> {
        // While commits are held, a row that is there was written by the open transaction.
        let verdict = Self::read(connection, id).await?;
        Ok(verdict != Some(FenceVerdict::Committed))
    }

    async fn may_commit(connection: &mut SqliteConnection, id: Uuid) -> Result<bool, sqlx::Error> {
        Ok(!Self::has_ended(connection, id).await?)
    }

    async fn insert(
        connection: &mut SqliteConnection,
        id: Uuid,
        verdict: FenceVerdict,
    ) -> Result<bool, sqlx::Error> {
        let done = sqlx::query(
            "INSERT INTO handfast_fence (message_id, verdict, at)
             VALUES (?, ?, CAST(unixepoch('subsec') * 1000000 AS INTEGER))
             ON CONFLICT (message_id) DO NOTHING",
        )
        .bind(&id.as_bytes()[..])
        .bind(verdict.name())
        .execute(connection)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn read(
        connection: &mut SqliteConnection,
        id: Uuid,
    ) -> Result<Option<FenceVerdict>, sqlx::Error> {
        let found: Option<String> =
            sqlx::query_scalar("SELECT verdict FROM handfast_fence WHERE message_id = ?")
                .bind(&id.as_bytes()[..])
                .fetch_optional(connection)
                .await?;
        found.as_deref().map(verdict).transpose()
    }

    fn is_busy(error: &sqlx::Error) -> bool {
        // The low byte of SQLite's extended code: 5 is BUSY, 6 is LOCKED.
        let sqlx::Error::Database(error) = error else {
            return false;
        };
        error
            .code()
            .and_then(|code| code.parse::<i32>().ok())
            .is_some_and(|code| matches!(code & 0xff, 5 | 6))
    }

    async fn now_us(pool: &SqlitePool) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER)")
            .fetch_one(pool)
            .await
    }

    async fn prune(pool: &Pool<Self>, before_us: i64, rows: u32) -> Result<u64, sqlx::Error> {
        let done = sqlx::query(
            "DELETE FROM handfast_fence WHERE message_id IN
                 (SELECT message_id FROM handfast_fence WHERE at < ? ORDER BY at LIMIT ?)",
        )
        .bind(before_us)
        .bind(rows)
        .execute(pool)
        .await?;
        Ok(done.rows_affected())
    }
}

/// Looks at one connection as the pool hands it out: these settings belong to connections.
async fn refuse_if_not_durable(connection: &mut SqliteConnection) -> Result<(), FenceError> {
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous")
        .fetch_one(&mut *connection)
        .await
        .map_err(read)?;
    if synchronous < SYNCHRONOUS_FULL {
        return Err(FenceError::NotDurable {
            setting: format!("`synchronous` is {synchronous}"),
            remedy: "open the pool with synchronous FULL",
        });
    }
    let journal: String = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *connection)
        .await
        .map_err(read)?;
    if ["off", "memory"].contains(&journal.as_str()) {
        return Err(FenceError::NotDurable {
            setting: format!("`journal_mode` is {journal}"),
            remedy: "use a file, with journal mode WAL",
        });
    }
    let locking: String = sqlx::query_scalar("PRAGMA locking_mode")
        .fetch_one(&mut *connection)
        .await
        .map_err(read)?;
    if locking == "exclusive" {
        return Err(FenceError::Exclusive);
    }
    Ok(())
}
