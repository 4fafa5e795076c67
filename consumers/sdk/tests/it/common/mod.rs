//! A consumer between a scripted service and a real SQLite file.

mod service;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use handfast_consumer::{
    Answer, BatchHandler, Consumer, Delivered, Error, Handler, Report, Subscriber, Tx, handfast,
};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) use service::{Service, id};

/// Longer than anything here takes; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) service: Service,
    pub(crate) pool: SqlitePool,
    pub(crate) batches: Arc<AtomicUsize>,
    pub(crate) shutdown: CancellationToken,
    dir: TempDir,
}

pub(crate) type Running = JoinHandle<Result<Report, Error>>;

impl World {
    pub(crate) async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let pool = pool(&dir).await;
        sqlx::raw_sql(
            "CREATE TABLE effect (one INTEGER PRIMARY KEY, message_id BLOB NOT NULL, word TEXT)",
        )
        .execute(&pool)
        .await
        .unwrap();
        handfast_consumer::migrate(&pool).await.unwrap();
        let now = sqlx::query_scalar("SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER)")
            .fetch_one(&pool)
            .await
            .unwrap();
        Self {
            service: Service::start(now).await,
            pool,
            batches: Arc::default(),
            shutdown: CancellationToken::new(),
            dir,
        }
    }

    pub(crate) async fn subscriber(&self) -> Subscriber<sqlx::Sqlite> {
        Consumer::connect(handfast(self.service.address()))
            .await
            .unwrap()
            .subscription("payment.completed", "accounting")
            .inbox(self.pool.clone())
            .handler_timeout(Duration::from_secs(5))
            .drain_deadline(PATIENCE)
    }

    pub(crate) fn obedient(&self) -> Obedient {
        Obedient {
            batches: Arc::clone(&self.batches),
            gate: None,
        }
    }

    /// As [`obedient`](Self::obedient), but each transaction waits for a permit.
    pub(crate) fn gated(&self) -> (Obedient, Arc<Semaphore>) {
        let gate = Arc::new(Semaphore::new(0));
        let mut handler = self.obedient();
        handler.gate = Some(Arc::clone(&gate));
        (handler, gate)
    }

    /// Starts a consumer whose handler does what each payload says.
    pub(crate) async fn start(&self) -> Running {
        self.start_with(self.subscriber().await)
    }

    pub(crate) fn start_with(&self, subscriber: Subscriber<sqlx::Sqlite>) -> Running {
        tokio::spawn(subscriber.run_batch(self.obedient(), self.shutdown.clone()))
    }

    pub(crate) async fn stop(&self, running: Running) -> Report {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, running)
            .await
            .expect("the consumer did not stop")
            .unwrap()
            .unwrap()
    }

    /// A second connection, outside of the consumer's pool.
    pub(crate) async fn other_pool(&self) -> SqlitePool {
        pool(&self.dir).await
    }

    pub(crate) async fn effects(&self, number: u128) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM effect WHERE message_id = ?")
            .bind(id(number))
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn all_effects(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM effect")
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// How often the inbox saw the message; 0 if it has no row.
    pub(crate) async fn seen(&self, number: u128) -> i64 {
        sqlx::query_scalar("SELECT coalesce(sum(seen), 0) FROM handfast_inbox WHERE message_id = ?")
            .bind(id(number))
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }
}

async fn pool(dir: &TempDir) -> SqlitePool {
    let file = SqliteConnectOptions::new()
        .filename(dir.path().join("consumer.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(5));
    SqlitePoolOptions::new()
        .max_connections(4)
        .connect_with(file)
        .await
        .unwrap()
}

/// Writes one effect per message and then does what the payload says.
pub(crate) struct Obedient {
    batches: Arc<AtomicUsize>,
    /// If set, nothing is handled until a permit is there.
    gate: Option<Arc<Semaphore>>,
}

impl Obedient {
    async fn obey(&self, tx: &mut Tx, message: &Delivered) -> Answer {
        let word = std::str::from_utf8(&message.payload).unwrap();
        sqlx::query("INSERT INTO effect (message_id, word) VALUES (?, ?)")
            .bind(message.message_id.as_bytes().as_slice())
            .bind(word)
            .execute(&mut *tx)
            .await
            .unwrap();
        match word {
            "ok" => Answer::Consumed,
            "fail" => Answer::failed("told to fail"),
            "later" => Answer::Later(Duration::from_millis(1_500)),
            "reject" => Answer::rejected("told to reject"),
            "panic" => panic!("told to panic"),
            "hang" => std::future::pending().await,
            other => unreachable!("{other}"),
        }
    }
}

impl BatchHandler for Obedient {
    async fn handle_batch(&self, tx: &mut Tx, messages: &[Delivered]) -> Vec<Answer> {
        self.batches.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let mut answers = Vec::new();
        for message in messages {
            answers.push(self.obey(tx, message).await);
        }
        answers
    }
}

impl Handler for Obedient {
    async fn handle(&self, tx: &mut Tx, message: &Delivered) -> Answer {
        self.obey(tx, message).await
    }
}
