//! The broker on a real RabbitMQ, in front of a store.

use std::collections::HashMap;

use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::message::{Answer, AnswerKind, ContentHash, DeliveryState, NewMessage};
use crate::store::Handoff;
use crate::world::{DEADLINE, TOPIC, World, id, message};

/// The server that tests use. Without one they fail: there is nothing else they could say.
fn url() -> String {
    std::env::var("HANDFAST_TEST_AMQP").unwrap_or_else(|_| {
        panic!("HANDFAST_TEST_AMQP is not set; run `cargo xtask test`, or name a server")
    })
}

pub(super) async fn connection() -> Connection {
    Connection::connect(&url(), ConnectionProperties::default())
        .await
        .unwrap()
}

/// Puts answers where the test sees them.
struct Heard(mpsc::UnboundedSender<(String, Answer)>);

#[async_trait]
impl AnswerSink for Heard {
    async fn acknowledge(&self, subscription: &str, answers: Vec<Answer>) -> Result<(), String> {
        for answer in answers {
            self.0.send((subscription.to_owned(), answer)).unwrap();
        }
        Ok(())
    }
}

struct Scene {
    world: World,
    rabbit: Arc<RabbitMq>,
    heard: mpsc::UnboundedReceiver<(String, Answer)>,
    /// For what the test does itself.
    connection: Connection,
    looks: Option<AbortOnDropHandle<()>>,
}

fn settings() -> Settings {
    Settings {
        addresses: Addresses::parse(&url()).unwrap(),
        deployment: format!("test-{}", Uuid::now_v7()),
        store: Uuid::from_u128(1),
        publisher_confirm: Duration::from_secs(10),
        lease: Duration::from_secs(30),
        resend_after: Duration::from_secs(45),
        seed: 1,
    }
}

mod handoff;

async fn scene() -> Scene {
    let scene = at_rest(settings()).await;
    scene.rabbit.connect(&[], DEADLINE).await.unwrap();
    scene.start()
}

/// A scene whose broker is not connected yet.
async fn at_rest(settings: Settings) -> Scene {
    let world = World::new().await;
    let rabbit = RabbitMq::new(
        world.store.clone(),
        world.topology.clone(),
        world.clock.clone(),
        settings,
    );
    let (_, heard) = mpsc::unbounded_channel();
    Scene {
        world,
        rabbit,
        heard,
        connection: connection().await,
        looks: None,
    }
}

impl Scene {
    fn start(mut self) -> Self {
        let (sender, heard) = mpsc::unbounded_channel();
        self.heard = heard;
        self.rabbit.start(Arc::new(Heard(sender)));
        let (store, rabbit) = (self.world.store.clone(), self.rabbit.clone());
        // As the service looks, and more often.
        let looks = tokio::spawn(async move {
            let names = ["accounting", "points"].map(str::to_owned);
            loop {
                if let Ok(due) = store.due(names.clone().into(), BTreeSet::new()).await {
                    rabbit.look_at(&due);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        self.looks = Some(AbortOnDropHandle::new(looks));
        self
    }

    async fn publish(&self, numbers: impl IntoIterator<Item = u128>) {
        self.world.publish(numbers).await;
        self.rabbit.due(&[TOPIC.to_owned()].into());
    }

    async fn channel(&self) -> Channel {
        self.connection.create_channel().await.unwrap()
    }

    async fn consume(&self, subscription: &str) -> Consumer {
        let channel = self.channel().await;
        let qos = BasicQosOptions::default();
        channel.basic_qos(100, qos).await.unwrap();
        let queue = self.rabbit.names.queue(subscription);
        let options = BasicConsumeOptions::default();
        let none = FieldTable::default();
        channel
            .basic_consume(queue.into(), "".into(), options, none)
            .await
            .unwrap()
    }

    async fn answer(&self, body: &str, user: Option<&str>) {
        let channel = self.channel().await;
        let queue = self.rabbit.names.acknowledge();
        let mut properties = BasicProperties::default().with_delivery_mode(2);
        if let Some(user) = user {
            properties = properties.with_user_id(user.into());
        }
        let options = BasicPublishOptions::default();
        channel
            .basic_publish(
                "".into(),
                queue.into(),
                options,
                body.as_bytes(),
                properties,
            )
            .await
            .unwrap();
    }

    async fn end(self) {
        end(&self.rabbit, &self.connection).await;
    }
}

/// Ends a broker, and takes everything away that it made.
async fn end(rabbit: &RabbitMq, connection: &Connection) {
    rabbit.shutdown().await;
    let mut queues = vec![rabbit.names.acknowledge(), rabbit.names.mark()];
    queues.extend(["accounting", "points"].map(|name| rabbit.names.queue(name)));
    for queue in queues {
        let options = QueueDeleteOptions::default();
        let channel = connection.create_channel().await.unwrap();
        channel.queue_delete(queue.into(), options).await.unwrap();
    }
}

/// The message ids and generations of the next deliveries, which are acked to RabbitMQ.
async fn received(consumer: &mut Consumer, number: usize) -> Vec<(String, i64)> {
    let mut all = Vec::new();
    while all.len() < number {
        let next = tokio::time::timeout(DEADLINE, consumer.next()).await;
        let delivery = next.expect("a delivery in time").unwrap().unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
        let headers = delivery.properties.headers().clone().unwrap();
        let generation = headers.inner().get("handfast-generation").cloned();
        let AMQPValue::LongInt(generation) = generation.unwrap() else {
            panic!("the generation is no long-int");
        };
        let message = delivery.properties.message_id().clone().unwrap();
        all.push((message.to_string(), generation.into()));
    }
    all
}

async fn eventually(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(DEADLINE, wait).await.is_err() {
        panic!("not in time: {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_arrives_once_in_each_subscriptions_queue_and_is_sent() {
    let scene = scene().await;
    let mut accounting = scene.consume("accounting").await;
    let mut points = scene.consume("points").await;
    scene.publish(1..=500).await;
    for consumer in [&mut accounting, &mut points] {
        let copies: HashMap<_, _> = received(consumer, 500).await.into_iter().collect();
        assert_eq!(copies.len(), 500, "each once");
        assert!(copies.values().all(|generation| *generation == 1));
    }
    scene
        .world
        .until(500, |delivery| delivery.state == DeliveryState::Sent)
        .await;
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_due_by_time_is_sent_however_busy_others_are() {
    let scene = scene().await;
    let mut accounting = scene.consume("accounting").await;
    let later = NewMessage {
        deliver_after: Some(scene.world.store.now().after(Duration::from_secs(60))),
        ..message(1)
    };
    scene
        .world
        .store
        .publish(vec![later], Handoff::none())
        .await
        .unwrap();
    let rabbit = Arc::clone(&scene.rabbit);
    let busy = tokio::spawn(async move {
        loop {
            rabbit.due(&["another".to_owned()].into());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    // Both lanes have looked at both subscriptions, found nothing that is due, and are idle.
    let claims = || scene.world.store.calls("claim_deliveries");
    let mut before = 0;
    eventually("the lanes are idle", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let idle = claims() == before && before >= 4;
        before = claims();
        idle
    })
    .await;
    scene.world.clock.advance(Duration::from_secs(61));
    assert_eq!(received(&mut accounting, 1).await.len(), 1);
    busy.abort();
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_cannot_be_read_closes_no_queue() {
    let scene = scene().await;
    let mut consumer = scene.consume("accounting").await;
    eventually("its queue is open", async || {
        let rooms = scene.rabbit.queues.rooms();
        rooms
            .iter()
            .any(|(name, room)| name == "accounting" && *room > 0)
    })
    .await;
    // That the lease cannot be given back takes longer than a flight is followed.
    let store = &scene.world.store;
    store.fail(&["load", "return_unsent"]);
    let handed = Handed {
        subscription: "accounting".into(),
        id: id(1),
        token: Uuid::from_u128(1),
        producer: "payment".into(),
        topic: TOPIC.into(),
        key: None,
        sent_at: Timestamp::from_micros(1),
        body_bytes: 1,
        bucket: 1,
        content_hash: ContentHash::from_bytes([0; 32]),
    };
    let permit = scene.rabbit.permit(1);
    scene.rabbit.hand_over(permit, vec![handed]).await;
    store.until_called("return_unsent", 3).await;
    store.heal();
    scene.publish([2]).await;
    let arrived = received(&mut consumer, 1).await;
    assert_eq!(arrived.len(), 1);
    assert_eq!(arrived[0].0, id(2).to_string());
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_rabbitmq_closes_takes_no_connection_along() {
    let scene = scene().await;
    let opened = scene.rabbit.looking.ready().await;
    for _ in 0..20 {
        let missing = declare::look(&opened, "nobodys-queue").await.unwrap();
        assert!(missing.is_none());
    }
    let now = scene.rabbit.looking.ready().await;
    assert!(Arc::ptr_eq(&opened, &now), "it is the same connection");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_wait_in_a_queue_than_its_subscription_allows() {
    let scene = at_rest(settings()).await;
    let mut topology = (*scene.world.topology.get()).clone();
    topology
        .subscriptions
        .get_mut("accounting")
        .unwrap()
        .max_in_queue = Some(20);
    scene.world.topology.set(topology);
    scene.rabbit.connect(&[], DEADLINE).await.unwrap();
    let scene = scene.start();
    scene.publish(1..=100).await;
    let mut points = scene.consume("points").await;
    assert_eq!(received(&mut points, 100).await.len(), 100);
    let waiting = || scene.rabbit.queue("accounting").unwrap().waiting;
    eventually("20 wait", async || waiting() == 20).await;
    let mut accounting = scene.consume("accounting").await;
    assert_eq!(received(&mut accounting, 100).await.len(), 100);
    assert!(waiting() <= 20);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_queue_is_made_again_and_its_neighbour_gets_one_copy() {
    let scene = scene().await;
    let mut points = scene.consume("points").await;
    eventually("both are open", async || {
        scene.rabbit.queues.is_open("accounting") && scene.rabbit.queues.is_open("points")
    })
    .await;
    let queue = scene.rabbit.names.queue("accounting");
    let channel = scene.channel().await;
    let options = QueueDeleteOptions::default();
    channel.queue_delete(queue.into(), options).await.unwrap();
    scene.publish(1..=50).await;
    let copies: HashMap<_, _> = received(&mut points, 50).await.into_iter().collect();
    assert_eq!(copies.len(), 50);
    eventually("the queue is back", async || {
        scene.rabbit.queues.is_open("accounting")
    })
    .await;
    // What was returned is due a second later by the store's clock, which stands still here.
    scene.world.clock.advance(Duration::from_secs(2));
    let mut accounting = scene.consume("accounting").await;
    let copies: HashMap<_, _> = received(&mut accounting, 50).await.into_iter().collect();
    assert_eq!(copies.len(), 50);
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_on_probation_and_says_why_until_it_takes_messages_again() {
    let settings = settings();
    let queue = Names::new(&settings.deployment).queue("accounting");
    let scene = at_rest(settings).await;
    let channel = scene.channel().await;
    // As a policy would do it, which a test cannot set over AMQP.
    let mut arguments = FieldTable::default();
    for (name, value) in [
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit", AMQPValue::LongInt(5)),
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ] {
        arguments.insert(name.into(), value);
    }
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(queue.as_str().into(), options, arguments)
        .await
        .unwrap();
    let refused = scene.rabbit.connect(&[], DEADLINE).await.unwrap_err();
    let Refused::OtherArguments { why, .. } = &refused else {
        panic!("{refused}");
    };
    assert!(why.contains("x-max-length"), "{why}");
    assert_eq!(refused.to_string().lines().count(), 1);
    let options = QueueDeleteOptions::default();
    for queue in [
        queue,
        scene.rabbit.names.mark(),
        scene.rabbit.names.queue("points"),
    ] {
        let channel = scene.channel().await;
        channel.queue_delete(queue.into(), options).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_stores_names_are_refused() {
    let first = scene().await;
    let mut settings = first.rabbit.settings.clone();
    settings.store = Uuid::from_u128(2);
    let second = at_rest(settings).await;
    let refused = second.rabbit.connect(&[], DEADLINE).await.unwrap_err();
    assert!(matches!(refused, Refused::OtherMark { .. }), "{refused}");
    assert!(
        refused
            .to_string()
            .contains(&Uuid::from_u128(1).to_string())
    );
    first.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_taken_and_broken_ones_do_not_hold_up_the_good() {
    let mut scene = scene().await;
    let mut topology = (*scene.world.topology.get()).clone();
    topology.subscriptions.get_mut("points").unwrap().amqp_user = Some("guest".into());
    scene.world.topology.set(topology);
    let body = |subscription: &str, n: u128| {
        format!(
            r#"{{"subscription":"{subscription}","answers":[{{"message_id":"{}","generation":1,"answer":"CONSUMED"}}]}}"#,
            id(n)
        )
    };
    scene.answer("no JSON at all", None).await;
    scene.answer(&body("nobody", 1), None).await;
    scene.answer(&body("points", 2), None).await;
    scene.answer(&body("points", 3), Some("guest")).await;
    scene.answer(&body("accounting", 4), None).await;
    let mut heard = HashMap::new();
    while heard.len() < 3 {
        let next = tokio::time::timeout(DEADLINE, scene.heard.recv()).await;
        let (subscription, answer) = next.unwrap().unwrap();
        assert_eq!(answer.kind, AnswerKind::Consumed);
        heard.insert(answer.id, subscription);
    }
    // The store knows best about a subscription that this process does not know.
    let expected = [(1, "nobody"), (3, "points"), (4, "accounting")];
    assert_eq!(heard, expected.map(|(n, s)| (id(n), s.to_owned())).into());
    let counts = AnswerState {
        trouble: String::new(),
        unreadable: 1,
        unknown: 1,
        foreign: 1,
    };
    assert_eq!(scene.rabbit.answers(), counts);
    eventually("the queue of answers is empty", async || {
        let channel = scene.channel().await;
        let queue = scene.rabbit.names.acknowledge();
        let purged = channel.queue_purge(queue.into(), QueuePurgeOptions::default());
        purged.await.unwrap() == 0
    })
    .await;
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_closes_its_channel_ends_dead_and_its_neighbours_arrive() {
    let scene = scene().await;
    let mut points = scene.consume("points").await;
    // The limits refuse this at prepare; the store is asked directly, as an older service might
    // have done.
    let mut poison = crate::world::message(7);
    poison.headers = vec![("CC".into(), "x".into())];
    let mut all: Vec<_> = (1..=6).map(crate::world::message).collect();
    all.insert(3, poison);
    use crate::store::Store as _;
    scene
        .world
        .store
        .publish(all, Handoff::none())
        .await
        .unwrap();
    scene.rabbit.due(&[TOPIC.to_owned()].into());
    let mut copies = std::collections::BTreeSet::new();
    let advance = async {
        loop {
            scene.world.clock.advance(Duration::from_secs(1));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let arrive = async {
        while copies.len() < 6 {
            copies.insert(received(&mut points, 1).await.remove(0).0);
        }
    };
    tokio::select! {
        () = arrive => {}
        () = advance => {}
    }
    assert!(!copies.contains(&id(7).to_string()));
    let died = async {
        loop {
            scene.world.clock.advance(Duration::from_secs(1));
            let delivery = scene.world.delivery(7).await;
            if delivery.state == DeliveryState::Dead {
                return delivery;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let dead = tokio::time::timeout(DEADLINE, died).await.unwrap();
    let why = dead.last_error.unwrap();
    assert!(why.contains("CC"), "{why}");
    scene.end().await;
}
