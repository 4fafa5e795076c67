//! SQLite lets one transaction write at a time, and lets those who wait poll for their turn. So
//! this process has one connection that writes, and its callers queue for it in order.

use std::path::Path;
use std::time::Duration;

use sqlx::Sqlite;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};

use super::{ACQUIRE_TIMEOUT, Records as _, Store};
use crate::database::Database;
use crate::run::Error;

/// How long a statement waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const READERS: u32 = 2;

/// Opens the file with durable settings and one connection, making it and its tables if they
/// do not exist.
pub async fn open_database(path: &Path) -> Result<SqlitePool, Error> {
    let failed = |source| Error::Database {
        database: Database::File(path.to_owned()),
        source,
    };
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_with(connect_options(path))
        .await
        .map_err(failed)?;
    handfast_producer::migrate(&pool).await?;
    sqlx::raw_sql(include_str!("../../migrations/sqlite/0001_payment.sql"))
        .execute(&pool)
        .await
        .map_err(failed)?;
    Ok(pool)
}

/// Opens an account with a balance in minor units; one that exists is left as it is.
pub async fn open_account(pool: &SqlitePool, name: &str, balance: i64) -> Result<(), sqlx::Error> {
    let store = Store {
        writer: pool.clone(),
        readers: pool.clone(),
    };
    store.open_account(name, balance).await
}

impl Store<Sqlite> {
    /// Opens the file; see [`open_database`].
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let writer = open_database(path).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(connect_options(path));
        Ok(Self { writer, readers })
    }
}

fn connect_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
}
