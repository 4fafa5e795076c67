//! An SQLite file, which is made if it is missing.

use std::path::Path;
use std::time::Duration;

use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use crate::Error;

/// Applied at every start.
pub(crate) const SCHEMA: &str = include_str!("../schema/sqlite.sql");

pub(super) async fn open(path: &Path) -> Result<SqlitePool, Error> {
    let file = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(5));
    let error = |doing| {
        move |source| Error::Database {
            doing,
            database: path.display().to_string(),
            source,
        }
    };
    // One for the transaction, one for pruning, and one that may still be closing.
    let pool = SqlitePoolOptions::new()
        .max_connections(3)
        .connect_with(file)
        .await
        .map_err(error("open"))?;
    sqlx::raw_sql(SCHEMA)
        .execute(&pool)
        .await
        .map_err(error("prepare"))?;
    Ok(pool)
}
