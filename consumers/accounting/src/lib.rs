//! Accounting: writes a balanced voucher for every completed payment.
//!
//! It consumes topic `payment.completed` as subscription `accounting`. The inbox makes sure
//! that a payment is booked once; the database itself (`schema.sql`) makes sure that what is
//! booked balances and stays. Read `payment` (what is understood), then `book` (what is done).

mod book;
mod options;
mod payment;

use std::path::PathBuf;
use std::time::Duration;

use handfast_consumer::{Consumer, handfast};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use tokio_util::sync::CancellationToken;

pub use book::Accounting;
pub use options::Options;
pub use payment::{Payment, Unreadable};

/// The topic that is consumed.
pub const TOPIC: &str = "payment.completed";
/// The subscription on it.
pub const SUBSCRIPTION: &str = "accounting";
/// The tables, to be applied at every start.
pub const SCHEMA: &str = include_str!("schema.sql");

/// Why accounting cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be opened or its tables cannot be made.
    #[error("cannot {doing} the database `{}`: {source}", path.display())]
    Database {
        /// `open` or `prepare`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The consumer cannot run.
    #[error(transparent)]
    Consumer(#[from] handfast_consumer::Error),
}

/// Books payments until `shutdown`, then finishes what it has. A service that is away is
/// waited for.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), Error> {
    let pool = open(&options.database).await?;
    Consumer::connect(handfast(options.service))
        .await?
        .subscription(TOPIC, SUBSCRIPTION)
        .inbox(pool.clone())
        .handler_timeout(Duration::from_millis(options.handler_timeout_ms))
        .prefetch(options.prefetch)
        .max_batch(options.max_batch as usize)
        .run_batch(Accounting, shutdown)
        .await?;
    pool.close().await;
    Ok(())
}

async fn open(path: &std::path::Path) -> Result<SqlitePool, Error> {
    let file = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(5));
    let error = |doing| {
        move |source| Error::Database {
            doing,
            path: path.to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(database: PathBuf) -> Options {
        Options {
            service: "http://127.0.0.1:9".to_owned(),
            database,
            handler_timeout_ms: 25_000,
            prefetch: 200,
            max_batch: 100,
        }
    }

    #[tokio::test]
    async fn it_starts_without_a_service_and_stops_when_told() {
        let dir = tempfile::TempDir::new().unwrap();
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run(options(dir.path().join("a.db")), shutdown.clone()));
        shutdown.cancel();
        running.await.unwrap().unwrap();
        assert!(dir.path().join("a.db").exists());
    }

    #[tokio::test]
    async fn a_database_that_cannot_be_opened_is_named_in_one_line() {
        let missing = PathBuf::from("/nowhere/accounting.db");
        let error = run(options(missing), CancellationToken::new()).await;
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("cannot open the database `/nowhere/accounting.db`: "));
        assert!(!text.contains('\n'));
    }
}
