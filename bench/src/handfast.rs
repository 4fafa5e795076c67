//! Handfast as its users run it on PostgreSQL and RabbitMQ: the service as a process of its own,
//! producers and consumers with the SDKs in this one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, Handler, Tx, rabbitmq};
use handfast_producer::{Message, Producer};
use sqlx::Postgres;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Failure;
use crate::place::Place;
use crate::service::Service;
use crate::topology::{PRODUCER, TOPIC, payload as payload_of};

/// A start takes this long at most, and so does the way of the first message.
const START: Duration = Duration::from_secs(30);
/// Between two looks at whether all answers are durable.
const LOOK: Duration = Duration::from_millis(50);

/// What is told of every delivery when its handler is entered.
pub(crate) trait Seen: Fn(&Delivered) + Clone + Send + Sync + 'static {}

impl<F: Fn(&Delivered) + Clone + Send + Sync + 'static> Seen for F {}

/// Whom a run is for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// Subscriptions that each have a consumer.
    pub(crate) consumed: Vec<String>,
    /// Subscriptions that have none.
    pub(crate) unattended: Vec<String>,
    /// Whether consumers take large batches, as who wants throughput lets them; otherwise they
    /// are as the SDK makes them.
    pub(crate) large_batches: bool,
    pub(crate) effect: Effect,
}

/// What a consumer does with a message, beside its inbox row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Effect {
    #[default]
    Nothing,
    /// Writes a row.
    Row,
    /// Writes a row in a transaction for each message.
    RowOneByOne,
}

impl Plan {
    fn all(&self) -> Vec<String> {
        [&self.consumed[..], &self.unattended].concat()
    }
}

/// Deliveries that a consumer with large batches holds, and what it takes in one transaction.
const PREFETCH: u32 = 1_000;
const LARGE_BATCH: usize = 500;
/// Transactions of such a consumer: while one is committed, the next is made.
const TRANSACTIONS: usize = 2;

/// A service with its consumers.
pub(crate) struct Running {
    pub(crate) producer: Producer,
    pub(crate) service: Service,
    plan: Plan,
    store: PgPool,
    inbox: PgPool,
    stop: CancellationToken,
    consumers: Vec<JoinHandle<Result<handfast_consumer::Report, handfast_consumer::Error>>>,
    /// Deliveries that were applied, of all subscriptions.
    applied: Arc<Applied>,
}

#[derive(Debug, Default)]
struct Applied {
    count: AtomicU64,
    more: Notify,
}

impl Running {
    /// Starts all of it, and returns when a first message has made its way.
    pub(crate) async fn start(place: &Place, plan: Plan, seen: impl Seen) -> Result<Self, Failure> {
        let service = Service::on_servers(place, &plan.all()).await?;
        let producer = Producer::connect(service.url.clone(), PRODUCER).await;
        let producer = producer.map_err(Failure::of("connect to the service"))?;
        let consumed = plan.consumed.len();
        let pool = async |url: &str| {
            let pool = PgPoolOptions::new().max_connections(4 * consumed as u32);
            let pool = pool.connect(url).await;
            pool.map_err(Failure::of("connect to PostgreSQL"))
        };
        let (store, inbox) = (pool(&place.store).await?, pool(&place.inbox).await?);
        if plan.effect != Effect::Nothing {
            sqlx::query(
                "CREATE TABLE IF NOT EXISTS effect (id uuid PRIMARY KEY, note text NOT NULL)",
            )
            .execute(&inbox)
            .await
            .map_err(Failure::of("make the consumers' table"))?;
        }
        let (stop, applied) = (CancellationToken::new(), Arc::new(Applied::default()));
        let mut consumers = Vec::new();
        for name in &plan.consumed {
            let source = rabbitmq(place.amqp.clone()).deployment(place.deployment.clone());
            let consumer = Consumer::connect(source).await;
            let consumer = consumer.map_err(Failure::of("consume"))?;
            let mut subscriber = consumer.subscription(TOPIC, name).inbox(inbox.clone());
            if plan.large_batches {
                subscriber = subscriber
                    .prefetch(PREFETCH)
                    .max_batch(LARGE_BATCH)
                    .concurrency(TRANSACTIONS);
            }
            let apply = Apply {
                seen: seen.clone(),
                applied: applied.clone(),
                effect: plan.effect,
            };
            consumers.push(match plan.effect {
                Effect::Nothing | Effect::Row => {
                    tokio::spawn(subscriber.run_batch(apply, stop.clone()))
                }
                Effect::RowOneByOne => tokio::spawn(subscriber.run(apply, stop.clone())),
            });
        }
        let mut running = Self {
            producer,
            service,
            plan,
            store,
            inbox,
            stop,
            consumers,
            applied,
        };
        running.first_message(consumed as u64).await?;
        Ok(running)
    }

    async fn first_message(&mut self, subscriptions: u64) -> Result<(), Failure> {
        let producer = self.producer.clone().with_deadline(START);
        let published = producer.publish(&Message::new(TOPIC)).await;
        published.map_err(Failure::of("publish the first message"))?;
        let applied = tokio::time::timeout(START, self.all_applied(subscriptions)).await;
        applied.map_err(|_| Failure(format!("the first message took more than {START:?}")))?
    }

    /// Waits until so many deliveries were applied and every answer is durable. The first
    /// message counts.
    pub(crate) async fn all_applied(&mut self, deliveries: u64) -> Result<(), Failure> {
        while self.applied.count.load(Ordering::SeqCst) < deliveries {
            tokio::select! {
                () = self.applied.more.notified() => {}
                ended = self.service.ended() => return Err(ended),
            }
        }
        loop {
            // Along the indexes, however much is stored.
            let open: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM delivery WHERE subscription = ANY($1)
                                    AND state = 'PENDING' AND stream_ends = 0)
                     OR EXISTS (SELECT FROM delivery WHERE subscription = ANY($1)
                                    AND state = 'PENDING' AND stream_ends > 0)
                     OR EXISTS (SELECT FROM delivery WHERE subscription = ANY($1)
                                    AND state = 'SENT')",
            )
            .bind(&self.plan.consumed)
            .fetch_one(&self.store)
            .await
            .map_err(Failure::of("look for open deliveries"))?;
            if !open {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Lets messages be handed over, and says how long it took until every delivery of theirs was
    /// answered.
    pub(crate) async fn load(
        &mut self,
        messages: u64,
        call: impl AsyncFnOnce(&Self) -> Result<(), Failure>,
    ) -> Result<Duration, Failure> {
        let began = Instant::now();
        call(self).await?;
        // The first message of the start counts, too.
        let deliveries = (messages + 1) * self.plan.consumed.len() as u64;
        self.all_applied(deliveries).await?;
        Ok(began.elapsed())
    }

    /// Ends all of it.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        self.stop.cancel();
        for consumer in self.consumers {
            let ended = consumer.await.map_err(Failure::of("end a consumer"))?;
            ended.map_err(Failure::of("consume"))?;
        }
        self.service.kill().await?;
        self.store.close().await;
        self.inbox.close().await;
        Ok(())
    }
}

/// Applies everything.
struct Apply<S> {
    seen: S,
    applied: Arc<Applied>,
    effect: Effect,
}

impl<S: Seen> Apply<S> {
    async fn apply(
        &self,
        tx: &mut Tx<Postgres>,
        messages: &[Delivered],
    ) -> Result<(), sqlx::Error> {
        for message in messages {
            (self.seen)(message);
        }
        if self.effect != Effect::Nothing {
            let ids: Vec<_> = messages.iter().map(|message| message.message_id).collect();
            let sql = "INSERT INTO effect (id, note) SELECT id, repeat('x', 200) FROM unnest($1::uuid[]) AS id";
            sqlx::query(sql).bind(ids).execute(&mut *tx).await?;
        }
        self.applied
            .count
            .fetch_add(messages.len() as u64, Ordering::SeqCst);
        self.applied.more.notify_one();
        Ok(())
    }
}

impl<S: Seen> BatchHandler<Postgres> for Apply<S> {
    async fn handle_batch(&self, tx: &mut Tx<Postgres>, messages: &[Delivered]) -> Vec<Answer> {
        let answer = match self.apply(tx, messages).await {
            Ok(()) => Answer::Consumed,
            Err(error) => Answer::failed(error.to_string()),
        };
        vec![answer; messages.len()]
    }
}

impl<S: Seen> Handler<Postgres> for Apply<S> {
    async fn handle(&self, tx: &mut Tx<Postgres>, message: &Delivered) -> Answer {
        match self.apply(tx, std::slice::from_ref(message)).await {
            Ok(()) => Answer::Consumed,
            Err(error) => Answer::failed(error.to_string()),
        }
    }
}

/// Prepares and confirms so many messages, each by a caller that waits for both, and so many
/// callers at a time. The SDK collects the calls.
pub(crate) async fn call(
    producer: &Producer,
    messages: u64,
    payload: usize,
    in_flight: u64,
) -> Result<(), Failure> {
    let message = Message::new(TOPIC).payload("application/octet-stream", payload_of(payload));
    let message = Arc::new(message);
    let next = Arc::new(AtomicU64::new(0));
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..in_flight.min(messages) {
        let (next, message) = (next.clone(), message.clone());
        let producer = producer.clone();
        callers.spawn(async move {
            while next.fetch_add(1, Ordering::Relaxed) < messages {
                let id = uuid::Uuid::now_v7();
                producer.prepare(id, &message, None).await?;
                producer.confirm(id).await?;
            }
            Ok::<(), handfast_producer::CallError>(())
        });
    }
    while let Some(done) = callers.join_next().await {
        let done = done.map_err(Failure::of("call"))?;
        done.map_err(Failure::of("prepare and confirm"))?;
    }
    Ok(())
}
