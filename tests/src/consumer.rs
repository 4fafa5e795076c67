//! A consumer with a handler of the test's own: the SDK, and a database in the world's folder.

use std::time::Duration;

use handfast_consumer::{BatchHandler, Consumer, Error, Report, handfast};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::world::World;

const STOP: Duration = Duration::from_secs(10);

/// A consumer that runs; dropped, it is gone without a word, as after a crash.
#[derive(Debug)]
pub struct Consuming {
    task: JoinHandle<Result<Report, Error>>,
    shutdown: CancellationToken,
}

impl Consuming {
    /// Stops it in good order and returns its numbers.
    pub async fn stop(mut self) -> Report {
        self.shutdown.cancel();
        tokio::time::timeout(STOP, &mut self.task)
            .await
            .unwrap_or_else(|_| panic!("the consumer did not stop within {STOP:?}"))
            .expect("the consumer did not panic")
            .expect("the consumer ended well")
    }
}

impl Drop for Consuming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    /// A database of the test's own in the world's folder, made if it is not there.
    pub async fn own_database(&self, name: &str, schema: &'static str) -> SqlitePool {
        let options = SqliteConnectOptions::new()
            .filename(self.file(&format!("{name}.db")))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await
            .unwrap_or_else(|error| panic!("cannot open {name}: {error}"));
        sqlx::raw_sql(schema)
            .execute(&pool)
            .await
            .unwrap_or_else(|error| panic!("the schema of {name}: {error}"));
        pool
    }

    /// Consumes with this handler; its effects and the inbox go to `pool`.
    pub async fn consume(
        &self,
        topic: &str,
        subscription: &str,
        pool: &SqlitePool,
        handler: impl BatchHandler,
    ) -> Consuming {
        let subscriber = Consumer::connect(handfast(self.service_url()))
            .await
            .expect("an address")
            .subscription(topic, subscription)
            .inbox(pool.clone());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(subscriber.run_batch(handler, shutdown.clone()));
        Consuming { task, shutdown }
    }
}
