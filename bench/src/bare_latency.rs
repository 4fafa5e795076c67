//! The bare pipeline at a fixed rate: Handfast's own statements and publisher, each as soon as there
//! is something for it, and the inbox row before the handler. It is the part of a latency that
//! comes from the work itself on these processors; gRPC, the service and the SDKs are what is left.
//! Behind calls, each of its two writes comes after a call to a service that does nothing, which
//! leaves what the service and the SDKs do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use handfast_service::broker::rabbitmq::Publisher;
use handfast_service::clock::SystemClock;
use handfast_service::message::MessageEvent;
use handfast_service::store::postgres::PostgresStore;
use handfast_service::store::{AnswerOutcome, Decision, Handed, Handoff, Store as _};
use lapin::Consumer;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use sqlx::postgres::PgPool;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::bytes::Bytes;
use uuid::Uuid;

use crate::Failure;
use crate::front::{Caller, Front};
use crate::latency::{AHEAD, FIRST, NONE, micros, note};
use crate::place::{Place, connect};
use crate::servers::Servers;
use crate::topology::PRODUCER;
use crate::{bare, latency, open_loop, topology};

/// Messages of one batch to RabbitMQ, of one inbox statement, and of one write of answers.
const BATCH: usize = 500;
/// Batches to RabbitMQ that are under way, each on a channel of its own.
const UNDER_WAY: usize = 3;
/// Answers wait this long for each other, as the SDK's do.
const COMPANY: Duration = Duration::from_millis(20);
/// The last message is waited for this long.
const LAST: Duration = Duration::from_secs(30);

/// What was applied: its answer is to be made durable, and then its delivery acked.
type Applied = (Vec<Uuid>, Delivery);

/// Moves so many messages, perhaps behind calls, and says for each how many milliseconds after its
/// time its inbox row was written.
pub(crate) async fn run(
    servers: &Servers,
    count: u64,
    rate: u32,
    payload: usize,
    behind_calls: bool,
) -> Result<Vec<f64>, Failure> {
    let place = Place::make(servers).await?;
    let names = topology::subscriptions(1);
    let (name, queue) = (names[0].clone(), place.queue(&names[0]));
    let store = bare::open(&place, &names, Arc::new(SystemClock::new())).await?;
    let inbox = bare::inbox(&place.inbox).await?;
    let (publishing, consuming) = (connect(&place.amqp).await?, connect(&place.amqp).await?);
    bare::declare(&publishing, &queue).await?;
    let consumer = bare::consume(&consuming, &queue, 0).await?;
    let front = match behind_calls {
        true => {
            let place = Place::make(servers).await?;
            Some((Front::start(&place, &names).await?, place))
        }
        false => None,
    };
    let times: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(NONE)).collect());
    let zero = Instant::now();

    // No bound of their own: there are never more than `count` messages.
    let (handed, to_send) = mpsc::unbounded_channel();
    let to_send = Arc::new(Mutex::new(to_send));
    let (applied, to_settle) = mpsc::unbounded_channel();
    let mut stages = JoinSet::new();
    for _ in 0..UNDER_WAY {
        let publisher = Publisher::open(&publishing).await;
        let publisher = publisher.map_err(Failure::of("open a channel"))?;
        let (store, name, queue) = (store.clone(), name.clone(), queue.clone());
        let to_send = to_send.clone();
        stages.spawn(send(store, publisher, name, queue, to_send));
    }
    let seen = {
        let times = times.clone();
        move |number| note(&times, number, micros(zero.elapsed()))
    };
    stages.spawn(apply(consumer, inbox.clone(), name.clone(), seen, applied));

    let first = zero.elapsed() + FIRST;
    let due = move |number: u64| first + Duration::from_secs(1) * number as u32 / rate;
    let calls = {
        let (store, name) = (store.clone(), name.clone());
        let caller = front.as_ref().map(|(front, _)| front.caller());
        open_loop::run(zero, count, due, AHEAD, move |number, go| {
            let (store, name, handed) = (store.clone(), name.clone(), handed.clone());
            let (caller, payload) = (caller.clone(), latency::numbered(number, payload));
            async move { call(&store, &name, payload, go, &handed, caller).await }
        })
    };
    let settled = tokio::spawn(settle(store.clone(), name, count, to_settle));
    let done = async {
        calls.await?;
        let settled = timeout(LAST, settled).await;
        let settled = settled.map_err(|_| Failure(format!("it took more than {LAST:?}")))?;
        settled.map_err(Failure::of("settle"))?
    };
    let done = tokio::select! {
        done = done => done,
        failure = bare::first_failure(&mut stages) => Err(failure),
    };
    stages.shutdown().await;
    store.close().await;
    inbox.close().await;
    done?;
    place.remove(servers, &names).await?;
    if let Some((front, place)) = front {
        front.stop().await?;
        place.remove(servers, &names).await?;
    }
    let late = |(number, time): (usize, &AtomicU64)| {
        let due = micros(due(number as u64));
        time.load(Ordering::SeqCst).saturating_sub(due) as f64 / 1_000.0
    };
    Ok(times.iter().enumerate().map(late).collect())
}

/// Prepares, waits for the time of the confirm, and confirms. The store joins what is called at the
/// same time, as it does for the service.
async fn call(
    store: &PostgresStore,
    subscription: &str,
    payload: Vec<u8>,
    go: oneshot::Receiver<()>,
    handed: &mpsc::UnboundedSender<Vec<Handed>>,
    mut caller: Option<Caller>,
) -> Result<(), Failure> {
    if let Some(caller) = &mut caller {
        caller.call(Bytes::from(payload.clone())).await?;
    }
    let message = bare::message(payload).ok_or_else(|| Failure("an id is nil".to_owned()))?;
    let id = message.id;
    let prepared = store.prepare(vec![message], bare::FIRST_CHECK).await;
    bare::accepted(&prepared.map_err(Failure::of("prepare"))?)?;
    go.await.map_err(Failure::of("wait for a confirm's time"))?;
    if let Some(caller) = &mut caller {
        caller.call(Bytes::new()).await?;
    }
    let confirm = Decision {
        id,
        event: MessageEvent::Confirm,
    };
    let handoff = Handoff {
        lease: bare::LEASE,
        room: [(subscription.to_owned(), 1)].into(),
    };
    let confirmed = store.decide(PRODUCER, vec![confirm], handoff).await;
    let confirmed = confirmed.map_err(Failure::of("confirm"))?;
    bare::accepted(&confirmed)?;
    let sent = handed.send(confirmed.handed);
    sent.map_err(Failure::of("hand a message over"))
}

/// The stage that sends what is there, one batch at a time.
async fn send(
    store: Arc<PostgresStore>,
    publisher: Publisher,
    subscription: String,
    queue: String,
    to_send: Arc<Mutex<mpsc::UnboundedReceiver<Vec<Handed>>>>,
) -> Result<(), Failure> {
    loop {
        let mut batch = Vec::new();
        let taken = to_send.lock().await.recv_many(&mut batch, BATCH).await;
        if taken == 0 {
            return Ok(());
        }
        let claims = store.load(batch.into_iter().flatten().collect()).await;
        let claims = claims.map_err(Failure::of("read bodies"))?;
        let claims = claims.into_iter().flatten().collect();
        let sent = publisher.send(&subscription, &queue, claims).await;
        sent.map_err(Failure::of("publish"))?;
    }
}

/// The stage that applies what is there.
async fn apply(
    consumer: Consumer,
    inbox: PgPool,
    subscription: String,
    seen: impl Fn(usize) + Send + 'static,
    applied: mpsc::UnboundedSender<Applied>,
) -> Result<(), Failure> {
    let mut ready = consumer.ready_chunks(BATCH);
    while let Some(deliveries) = ready.next().await {
        let (mut deliveries, ids) = bare::read(deliveries)?;
        bare::write_inbox(&inbox, &subscription, &ids).await?;
        let numbers = deliveries.iter();
        numbers
            .filter_map(|one| latency::number(&one.data))
            .for_each(&seen);
        if let Some(last) = deliveries.pop() {
            let done = applied.send((ids, last));
            done.map_err(Failure::of("go on"))?;
        }
    }
    Err(Failure("RabbitMQ ended a consumer".to_owned()))
}

/// The stage that makes answers durable, until all are.
async fn settle(
    store: Arc<PostgresStore>,
    subscription: String,
    all: u64,
    mut applied: mpsc::UnboundedReceiver<Applied>,
) -> Result<(), Failure> {
    let mut done = 0;
    while done < all {
        let mut batch = Vec::new();
        if applied.recv_many(&mut batch, BATCH).await == 0 {
            return Err(Failure("the stages ended early".to_owned()));
        }
        sleep(COMPANY).await;
        while let Ok(more) = applied.try_recv() {
            batch.push(more);
        }
        let answers = batch.iter().flat_map(|(ids, _)| ids);
        let answers = answers.filter_map(bare::consumed);
        let recorded = store.acknowledge(&subscription, answers.collect()).await;
        let recorded = recorded.map_err(Failure::of("acknowledge"))?;
        if let Some(other) = recorded.iter().find(|one| **one != AnswerOutcome::Recorded) {
            return Err(Failure(format!("an answer was not recorded: {other:?}")));
        }
        done += recorded.len() as u64;
        if let Some((_, last)) = batch.last() {
            let acked = last.ack(BasicAckOptions { multiple: true }).await;
            acked.map_err(Failure::of("ack"))?;
        }
    }
    Ok(())
}
