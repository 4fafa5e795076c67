//! Points: grants its user a point for every 100 minor units of a completed payment.
//!
//! It consumes topic `payment.completed` as subscription `points`, from the message service or
//! from RabbitMQ, and keeps its grants in SQLite or PostgreSQL. The inbox makes sure that a
//! payment is rewarded once; the database itself (`schema/`) makes sure that a balance is the
//! sum of its grants. Read `payment` (what is understood), then `grant` (what is done).

mod database;
mod grant;
mod options;
mod payment;

use std::time::Duration;

use database::Database;
use handfast_consumer::{Consumer, Source, handfast, rabbitmq};
use sqlx::Pool;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use grant::{Grants, Points};
pub use options::Options;
pub use payment::{Payment, Unreadable};

/// The topic that is consumed.
pub const TOPIC: &str = "payment.completed";
/// The subscription on it.
pub const SUBSCRIPTION: &str = "points";
/// How long the database's connections are waited for at the end.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Why points cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database's address cannot be read.
    #[error(
        "cannot read the database's address: \
         it must be like postgres://user:password@127.0.0.1:5432/points"
    )]
    Address,
    /// The database cannot be opened or its tables cannot be made.
    #[error("cannot {doing} the database `{database}`: {source}")]
    Database {
        /// `open` or `prepare`.
        doing: &'static str,
        /// The file, or the database and its server.
        database: String,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The consumer cannot run.
    #[error(transparent)]
    Consumer(#[from] handfast_consumer::Error),
}

/// Grants points until `shutdown`, then finishes what it has. A source or a database server
/// that is away is waited for.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), Error> {
    // First, so that an address that cannot be read is told at once.
    let consumer = Consumer::connect(source(&options)).await?;
    match Database::open(&options.database, &shutdown).await? {
        Some(Database::Sqlite(pool)) => consume(consumer, pool, options, shutdown).await,
        Some(Database::Postgres(pool)) => consume(consumer, pool, options, shutdown).await,
        None => Ok(()),
    }
}

fn source(options: &Options) -> Source {
    let address = options.source.as_str();
    if address.starts_with("amqp://") || address.starts_with("amqps://") {
        rabbitmq(address).deployment(&options.deployment).into()
    } else {
        handfast(address)
    }
}

async fn consume<D: Grants>(
    consumer: Consumer,
    pool: Pool<D>,
    options: Options,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    consumer
        .subscription(TOPIC, SUBSCRIPTION)
        .inbox(pool.clone())
        .handler_timeout(Duration::from_millis(options.handler_timeout_ms))
        .prefetch(options.prefetch)
        .max_batch(options.max_batch as usize)
        .run_batch(Points, shutdown)
        .await?;
    // A connection that is still at work at the drain deadline must not keep the process.
    let _ = timeout(CLOSE_WAIT, pool.close()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(source: &str, database: impl Into<String>) -> Options {
        Options {
            source: source.to_owned(),
            deployment: "handfast".to_owned(),
            database: database.into(),
            handler_timeout_ms: 25_000,
            prefetch: 200,
            max_batch: 100,
        }
    }

    const AWAY: [&str; 2] = ["http://127.0.0.1:9", "amqp://guest:guest@127.0.0.1:9/%2f"];

    #[tokio::test]
    async fn it_starts_without_a_source_and_stops_when_told() {
        let dir = tempfile::TempDir::new().unwrap();
        for source in AWAY {
            let file = dir.path().join(&source[..4]);
            let options = options(source, file.display().to_string());
            let shutdown = CancellationToken::new();
            let running = tokio::spawn(run(options, shutdown.clone()));
            shutdown.cancel();
            running.await.unwrap().unwrap();
            assert!(file.exists());
        }
    }

    #[tokio::test]
    async fn it_waits_for_a_database_server_and_stops_when_told() {
        let options = options(AWAY[1], "postgres://user:secret@127.0.0.1:9/points");
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run(options, shutdown.clone()));
        tokio::task::yield_now().await;
        shutdown.cancel();
        running.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_does_not_come_back_does_not_keep_the_process() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("consumer.db").display().to_string();
        let options = options(AWAY[0], path);
        let shutdown = CancellationToken::new();
        let Some(Database::Sqlite(pool)) =
            Database::open(&options.database, &shutdown).await.unwrap()
        else {
            panic!("a file is SQLite");
        };
        let _kept = pool.acquire().await.unwrap();
        let consumer = Consumer::connect(source(&options)).await.unwrap();
        shutdown.cancel();
        let stopped = consume(consumer, pool, options, shutdown);
        let stopped = timeout(Duration::from_secs(20), stopped).await;
        stopped.expect("it waits for a connection").unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_named_in_one_line() {
        for (source, database, text) in [
            (
                AWAY[0],
                "/nowhere/points.db",
                "cannot open the database `/nowhere/points.db`: ",
            ),
            (
                AWAY[0],
                "postgres://user:secret@one:port/points",
                "cannot read the database's address: ",
            ),
            (
                "amqps://guest:secret@one",
                "points.db",
                "cannot read the source's address `amqps://guest@one`: ",
            ),
        ] {
            let run = run(options(source, database), CancellationToken::new());
            let error = run.await.unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
            assert!(
                !error.contains('\n') && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
