//! The bare pipeline: Handfast's own statements and publisher in batches, one stage after the
//! other in one process, and a batched inbox. No service, no gRPC, no SDK; retention runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use handfast_service::broker::rabbitmq::Publisher;
use handfast_service::clock::SystemClock;
use handfast_service::message::{Answer, AnswerKind, MessageEvent, MessageId, NewMessage};
use handfast_service::retention::{self, Retention};
use handfast_service::store::postgres::{Address, PostgresStore};
use handfast_service::store::{Decision, Handed, Handoff, Store as _, Written};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, Consumer};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;
use crate::place::{Place, connect};
use crate::topology::{PRODUCER, TOPIC, payload as payload_of, topology};

/// Messages of one statement, and of one batch to RabbitMQ.
const BATCH: usize = 500;
/// Calls of one kind under way: while one is committed, the next is made.
const UNDER_WAY: usize = 2;
/// Batches that wait between two stages.
const BETWEEN: usize = 8;
/// Deliveries that a consumer holds.
const PREFETCH: u16 = 2_000;
pub(crate) const LEASE: Duration = Duration::from_secs(30);

/// What is not confirmed is checked after this.
pub(crate) const FIRST_CHECK: Duration = Duration::from_secs(10);

/// Batches of messages under way to their publisher.
type Sends = Vec<mpsc::Sender<Vec<Handed>>>;

/// Moves so many messages from prepare to the durable answer of each subscription, and says how
/// long it took.
pub(crate) async fn run(
    place: &Place,
    subscriptions: &[String],
    messages: u64,
    payload: usize,
) -> Result<Duration, Failure> {
    let clock = Arc::new(SystemClock::new());
    let store = open(place, subscriptions, clock.clone()).await?;
    let inbox = inbox(&place.inbox).await?;
    let (publishing, consuming) = (connect(&place.amqp).await?, connect(&place.amqp).await?);
    let mut stages = JoinSet::new();
    let (sends, answers) = {
        let (answers, answered) = mpsc::channel(BETWEEN);
        let mut sends: Sends = Vec::new();
        for name in subscriptions {
            declare(&publishing, &place.queue(name)).await?;
            for consumer in [1, 2] {
                let consumer = consume(&consuming, &place.queue(name), consumer).await?;
                let (inbox, answers) = (inbox.clone(), answers.clone());
                stages.spawn(apply(consumer, inbox, name.clone(), answers));
            }
            let (handed, to_send) = mpsc::channel(BETWEEN);
            let publishers = [
                Publisher::open(&publishing).await,
                Publisher::open(&publishing).await,
            ];
            let mut ready = Vec::new();
            for publisher in publishers {
                ready.push(publisher.map_err(Failure::of("open a channel"))?);
            }
            let queue = (name.clone(), place.queue(name));
            stages.spawn(send(store.clone(), ready, queue, to_send));
            sends.push(handed);
        }
        (sends, answered)
    };
    let retention = Retention::new(store.clone(), clock, retention::Settings::default());
    stages.spawn(async move {
        loop {
            let done = retention.run_once().await;
            done.map_err(Failure::of("run retention"))?;
            tokio::time::sleep(retention.period()).await;
        }
    });

    let began = Instant::now();
    let (prepared, to_confirm) = mpsc::channel(BETWEEN);
    stages.spawn(prepare(store.clone(), messages, payload, prepared));
    stages.spawn(confirm(
        store.clone(),
        subscriptions.to_vec(),
        to_confirm,
        sends,
    ));
    let all = messages * subscriptions.len() as u64;
    let settled = settle(store.clone(), all, answers);
    // The first stage that fails ends the run; those that are done are not waited for.
    let took = tokio::select! {
        settled = settled => settled.map(|()| began.elapsed()),
        failure = first_failure(&mut stages) => Err(failure),
    };
    stages.shutdown().await;
    store.close().await;
    inbox.close().await;
    took
}

/// The store, with its topology.
pub(crate) async fn open(
    place: &Place,
    subscriptions: &[String],
    clock: Arc<SystemClock>,
) -> Result<Arc<PostgresStore>, Failure> {
    let address: Address = place
        .store
        .parse()
        .map_err(Failure::of("read the URL of the store"))?;
    let store = PostgresStore::open(address, clock, 1).await;
    let store = Arc::new(store.map_err(Failure::of("open the store"))?);
    store
        .apply_topology(topology(subscriptions))
        .await
        .map_err(Failure::of("apply the topology"))?;
    Ok(store)
}

/// The first stage that fails. Never returns if none does.
pub(crate) async fn first_failure(stages: &mut JoinSet<Result<(), Failure>>) -> Failure {
    while let Some(done) = stages.join_next().await {
        match done {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => return failure,
            Err(error) => return Failure(format!("a stage ended: {error}")),
        }
    }
    std::future::pending().await
}

/// The stage that makes and prepares messages.
async fn prepare(
    store: Arc<PostgresStore>,
    messages: u64,
    payload: usize,
    prepared: mpsc::Sender<Vec<MessageId>>,
) -> Result<(), Failure> {
    let batches = (0..messages).step_by(BATCH).map(|first| {
        let count = BATCH.min(usize::try_from(messages - first).unwrap_or(BATCH));
        let batch: Vec<_> = (0..count)
            .filter_map(|_| message(payload_of(payload)))
            .collect();
        let store = store.clone();
        async move {
            let ids = batch.iter().map(|message| message.id).collect();
            let written = store.prepare(batch, FIRST_CHECK).await;
            accepted(&written.map_err(Failure::of("prepare"))?)?;
            Ok::<Vec<MessageId>, Failure>(ids)
        }
    });
    let done = stream::iter(batches).buffered(UNDER_WAY);
    done.try_for_each(async |ids| prepared.send(ids).await.map_err(Failure::of("go on")))
        .await
}

/// The stage that confirms.
async fn confirm(
    store: Arc<PostgresStore>,
    subscriptions: Vec<String>,
    to_confirm: mpsc::Receiver<Vec<MessageId>>,
    sends: Sends,
) -> Result<(), Failure> {
    let confirmed = batches(to_confirm).map(|ids| {
        let decisions = ids.into_iter().map(|id| Decision {
            id,
            event: MessageEvent::Confirm,
        });
        let handoff = Handoff {
            lease: LEASE,
            room: subscriptions
                .iter()
                .map(|name| (name.clone(), BATCH))
                .collect(),
        };
        let (store, decisions) = (store.clone(), decisions.collect());
        async move {
            let written = store.decide(PRODUCER, decisions, handoff).await;
            let written = written.map_err(Failure::of("confirm"))?;
            accepted(&written)?;
            match written.topics.is_empty() {
                true => Ok(written.handed),
                false => Err(Failure(
                    "a confirm did not hand over all it made".to_owned(),
                )),
            }
        }
    });
    let mut confirmed = std::pin::pin!(confirmed.buffered(UNDER_WAY));
    while let Some(handed) = confirmed.next().await {
        let mut by: BTreeMap<String, Vec<Handed>> = BTreeMap::new();
        for one in handed? {
            by.entry(one.subscription.clone()).or_default().push(one);
        }
        for (name, handed) in by {
            let index = subscriptions.iter().position(|known| *known == name);
            if let Some(send) = index.and_then(|index| sends.get(index)) {
                send.send(handed).await.map_err(Failure::of("go on"))?;
            }
        }
    }
    Ok(())
}

/// The stage that sends to one queue, with a batch on each channel.
async fn send(
    store: Arc<PostgresStore>,
    publishers: Vec<Publisher>,
    (subscription, queue): (String, String),
    to_send: mpsc::Receiver<Vec<Handed>>,
) -> Result<(), Failure> {
    let publishers = Arc::new(publishers);
    let turns = batches(to_send).enumerate().map(|(turn, handed)| {
        let (store, publishers) = (store.clone(), publishers.clone());
        let (subscription, queue) = (subscription.clone(), queue.clone());
        async move {
            let claims = store.load(handed).await;
            let claims = claims.map_err(Failure::of("read bodies"))?;
            let claims = claims.into_iter().flatten().collect();
            let publisher = &publishers[turn % publishers.len()];
            let sent = publisher.send(&subscription, &queue, claims).await;
            sent.map_err(Failure::of("publish"))
        }
    });
    turns
        .buffered(UNDER_WAY)
        .try_for_each(async |()| Ok(()))
        .await
}

/// The stage that applies: an inbox row per message, in batches, then the AMQP ack.
async fn apply(
    consumer: Consumer,
    inbox: PgPool,
    subscription: String,
    answers: mpsc::Sender<(String, Vec<Answer>)>,
) -> Result<(), Failure> {
    let mut ready = consumer.ready_chunks(BATCH);
    while let Some(deliveries) = ready.next().await {
        let (deliveries, ids) = read(deliveries)?;
        write_inbox(&inbox, &subscription, &ids).await?;
        if let Some(last) = deliveries.last() {
            let all = last.acker.ack(BasicAckOptions { multiple: true }).await;
            all.map_err(Failure::of("ack"))?;
        }
        let answer = (
            subscription.clone(),
            ids.iter().filter_map(consumed).collect(),
        );
        answers.send(answer).await.map_err(Failure::of("go on"))?;
    }
    Err(Failure("RabbitMQ ended a consumer".to_owned()))
}

/// Deliveries, and the ids of their messages.
pub(crate) fn read(
    deliveries: Vec<lapin::Result<Delivery>>,
) -> Result<(Vec<Delivery>, Vec<Uuid>), Failure> {
    let deliveries: Result<Vec<_>, _> = deliveries.into_iter().collect();
    let deliveries = deliveries.map_err(Failure::of("consume"))?;
    let id = |delivery: &Delivery| {
        let id = delivery.properties.message_id().as_ref();
        let id = id.and_then(|id| Uuid::parse_str(id.as_str()).ok());
        id.ok_or_else(|| Failure("a delivery has no message id".to_owned()))
    };
    let ids: Result<Vec<_>, _> = deliveries.iter().map(id).collect();
    Ok((deliveries, ids?))
}

/// A transaction of its own, as any one statement.
pub(crate) async fn write_inbox(
    inbox: &PgPool,
    subscription: &str,
    ids: &[Uuid],
) -> Result<(), Failure> {
    sqlx::query(
        "INSERT INTO handfast_inbox AS inbox (subscription, message_id)
         SELECT $1, id FROM unnest($2::uuid[]) AS id ORDER BY id
         ON CONFLICT (subscription, message_id) DO UPDATE SET seen = inbox.seen + 1",
    )
    .bind(subscription)
    .bind(ids)
    .execute(inbox)
    .await
    .map_err(Failure::of("write the inbox"))?;
    Ok(())
}

/// The answer of who has applied a message.
pub(crate) fn consumed(id: &Uuid) -> Option<Answer> {
    Some(Answer {
        id: MessageId::from_bytes(id.as_bytes())?,
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    })
}

/// The stage that makes answers durable, until all are.
async fn settle(
    store: Arc<PostgresStore>,
    all: u64,
    answers: mpsc::Receiver<(String, Vec<Answer>)>,
) -> Result<(), Failure> {
    let settled = batches(answers).map(|(subscription, answers)| {
        let store = store.clone();
        async move {
            let recorded = store.acknowledge(&subscription, answers).await;
            let recorded = recorded.map_err(Failure::of("acknowledge"))?;
            Ok::<u64, Failure>(recorded.len() as u64)
        }
    });
    let mut settled = std::pin::pin!(settled.buffered(UNDER_WAY));
    let mut done = 0;
    while done < all {
        match settled.next().await {
            Some(more) => done += more?,
            None => return Err(Failure("the stages ended early".to_owned())),
        }
    }
    Ok(())
}

fn batches<T>(receiver: mpsc::Receiver<T>) -> impl futures_util::Stream<Item = T> {
    stream::unfold(receiver, async |mut receiver| {
        let next = receiver.recv().await?;
        Some((next, receiver))
    })
}

/// Whether every item was.
pub(crate) fn accepted(written: &Written) -> Result<(), Failure> {
    let mut refusals = written.items.iter().filter_map(|item| item.as_ref().err());
    match refusals.next() {
        None => Ok(()),
        Some(refusal) => Err(Failure(format!("a message was refused: {refusal:?}"))),
    }
}

pub(crate) fn message(payload: Vec<u8>) -> Option<NewMessage> {
    Some(NewMessage {
        id: MessageId::from_bytes(Uuid::now_v7().as_bytes())?,
        producer: PRODUCER.to_owned(),
        topic: TOPIC.to_owned(),
        key: None,
        content_type: "application/octet-stream".to_owned(),
        headers: Vec::new(),
        payload,
        deliver_after: None,
        fence: None,
    })
}

pub(crate) async fn inbox(url: &str) -> Result<PgPool, Failure> {
    let pool = PgPoolOptions::new().max_connections(4).connect(url).await;
    let pool = pool.map_err(Failure::of("connect to the inbox"))?;
    let migrated = handfast_consumer::migrate(&pool).await;
    migrated.map_err(Failure::of("make the inbox"))?;
    Ok(pool)
}

/// The queue as the service declares it.
pub(crate) async fn declare(connection: &Connection, queue: &str) -> Result<(), Failure> {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(5));
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let channel = connection.create_channel().await;
    let channel = channel.map_err(Failure::of("open a channel"))?;
    channel
        .queue_declare(queue.into(), options, arguments)
        .await
        .map_err(Failure::of("declare a queue"))?;
    Ok(())
}

pub(crate) async fn consume(
    connection: &Connection,
    queue: &str,
    number: u8,
) -> Result<Consumer, Failure> {
    let channel = connection.create_channel().await;
    let channel = channel.map_err(Failure::of("open a channel"))?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await
        .map_err(Failure::of("bound a consumer"))?;
    let tag = format!("bare-{number}");
    channel
        .basic_consume(
            queue.into(),
            tag.as_str().into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await
        .map_err(Failure::of("consume"))
}
