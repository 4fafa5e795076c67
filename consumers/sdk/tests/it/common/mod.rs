//! A consumer between a scripted service and a real database.

mod database;
mod proxy;
mod rabbit;
mod service;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use handfast_consumer::{
    Answer, BatchHandler, Consumer, Delivered, Error, Handler, Report, Source, Subscriber, Tx,
    handfast,
};
use sqlx::Pool;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) use database::{Database, on_every_database};
pub(crate) use proxy::Proxy;
pub(crate) use rabbit::{Rabbit, address as amqp};
pub(crate) use service::Service;

/// Longer than anything here takes; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World<D: Database> {
    pub(crate) service: Service,
    pub(crate) pool: Pool<D>,
    pub(crate) batches: Batches,
    pub(crate) shutdown: CancellationToken,
    /// When the world began, by its database.
    pub(crate) now: i64,
    pub(crate) home: D::Home,
}

/// Which messages the handler got together, in order.
pub(crate) type Batches = Arc<Mutex<Vec<Vec<u128>>>>;

pub(crate) type Running = JoinHandle<Result<Report, Error>>;

impl<D: Database> World<D> {
    pub(crate) async fn new() -> Self {
        let home = D::home().await;
        let pool = D::open(&home).await;
        let mut db = pool.acquire().await.unwrap();
        D::run(&mut db, D::SCHEMA.to_owned()).await;
        let now = D::now(&mut db).await.unwrap();
        drop(db);
        handfast_consumer::migrate(&pool).await.unwrap();
        Self {
            service: Service::start(now).await,
            pool,
            batches: Arc::default(),
            shutdown: CancellationToken::new(),
            now,
            home,
        }
    }

    pub(crate) async fn subscriber(&self) -> Subscriber<D> {
        self.subscriber_of(handfast(self.service.address())).await
    }

    pub(crate) async fn subscriber_of(&self, source: impl Into<Source>) -> Subscriber<D> {
        Consumer::connect(source)
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

    pub(crate) fn start_with(&self, subscriber: Subscriber<D>) -> Running {
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

    /// A second pool, outside of the consumer's.
    pub(crate) async fn other_pool(&self) -> Pool<D> {
        D::open(&self.home).await
    }

    pub(crate) async fn effects(&self, number: u128) -> i64 {
        let sql = "SELECT count(*) FROM effect WHERE message_id = $1";
        D::count_of(&self.pool, sql, Uuid::from_u128(number)).await
    }

    pub(crate) async fn all_effects(&self) -> i64 {
        D::count(&self.pool, "SELECT count(*) FROM effect").await
    }

    pub(crate) async fn until_effects(&self, count: i64) {
        let wait = async {
            while self.all_effects().await < count {
                tokio::task::yield_now().await;
            }
        };
        let met = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(met, "fewer than {count} effects");
    }

    /// Waits until the handler was given so many batches.
    pub(crate) async fn until_batches(&self, count: usize) {
        let wait = async {
            while self.batches.lock().unwrap().len() < count {
                tokio::task::yield_now().await;
            }
        };
        let met = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(met, "fewer than {count} batches");
    }

    /// How often the inbox saw the message; 0 if it has no row.
    pub(crate) async fn seen(&self, number: u128) -> i64 {
        let sql = "SELECT coalesce(max(seen), 0) FROM handfast_inbox WHERE message_id = $1";
        D::count_of(&self.pool, sql, Uuid::from_u128(number)).await
    }

    /// Runs SQL that every database understands.
    pub(crate) async fn run(&self, sql: &str) {
        let mut db = self.pool.acquire().await.unwrap();
        D::run(&mut db, sql.to_owned()).await;
    }
}

/// Writes one effect per message and then does what the payload says.
pub(crate) struct Obedient {
    batches: Batches,
    /// If set, nothing is handled until a permit is there.
    gate: Option<Arc<Semaphore>>,
}

impl Obedient {
    async fn obey<D: Database>(&self, tx: &mut Tx<D>, message: &Delivered) -> Answer {
        let word = std::str::from_utf8(&message.payload).unwrap();
        D::insert_effect(tx, message.message_id, word)
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

impl<D: Database> BatchHandler<D> for Obedient {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let ids = messages.iter().map(|m| m.message_id.as_u128()).collect();
        self.batches.lock().unwrap().push(ids);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let mut answers = Vec::new();
        for message in messages {
            answers.push(self.obey::<D>(tx, message).await);
        }
        answers
    }
}

impl<D: Database> Handler<D> for Obedient {
    async fn handle(&self, tx: &mut Tx<D>, message: &Delivered) -> Answer {
        self.obey::<D>(tx, message).await
    }
}
