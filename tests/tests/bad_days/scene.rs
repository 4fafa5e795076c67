//! A service on a RabbitMQ of its own, and one topic with two subscriptions: what happens to
//! `troubled` must not concern `steady`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use handfast_consumer::{Answer, BatchHandler, Delivered, Tx};
use handfast_proto::v1::{
    BrokerCounts, BrokerState, CountsRequest, CountsResponse, MessageState, PublishRequest,
    item_result,
};
use handfast_servers::RabbitMq;
use handfast_tests::books::Delivery;
use handfast_tests::clients::message;
use handfast_tests::database::rows;
use handfast_tests::{
    Config, Consuming, Database, Engines, Own, Party, Schema, Servers, World, eventually, stays,
};

pub(crate) const TOPIC: &str = "fact";
pub(crate) const STEADY: &str = "steady";
pub(crate) const TROUBLED: &str = "troubled";
const SOURCE: &str = "source";
/// What the service needs to notice.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// After a repair everything goes on by itself within this time.
pub(crate) const RESUMES: Duration = Duration::from_secs(10);
/// What goes on is not slower than this on a busy machine.
const NOT_DELAYED_US: i64 = 3_000_000;

/// The id of a message.
pub(crate) type Id = Vec<u8>;

const KEPT: Schema =
    Schema::both("CREATE TABLE kept (message_id bytea NOT NULL, what text NOT NULL)");
const KEEP: &str = "INSERT INTO kept (message_id, what) VALUES ($1, $2)";

/// Keeps what it is given, without a unique key so that doubling would show.
struct Keep;

impl<D: Own> BatchHandler<D> for Keep {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            let kept = D::write(tx, KEEP, message.message_id, &message.topic).await;
            answers.push(kept.map_or_else(Answer::failed, |()| Answer::Consumed));
        }
        answers
    }
}

/// A consumer of one of the two.
pub(crate) struct Sink {
    subscription: &'static str,
    database: Database,
    _consuming: Consuming,
}

impl Sink {
    /// Each of these was kept once, and nothing else; and says how many copies came.
    pub(crate) async fn kept_once(&self, ids: &[Id]) -> i64 {
        let kept: Vec<(Id,)> = rows(&self.database, "SELECT message_id FROM kept").await;
        let mut kept: Vec<_> = kept.into_iter().map(|(id,)| id).collect();
        let mut expected = ids.to_vec();
        kept.sort();
        expected.sort();
        assert_eq!(kept, expected, "{} keeps each once", self.subscription);
        self.copies().await.values().sum()
    }

    /// Each of these came exactly once.
    pub(crate) async fn came_once(&self, ids: &[Id]) {
        self.kept_once(ids).await;
        let copies = self.copies().await;
        let repeated: Vec<_> = copies.values().filter(|seen| **seen != 1).collect();
        assert!(
            repeated.is_empty(),
            "{} got copies: {repeated:?}",
            self.subscription
        );
    }

    async fn copies(&self) -> BTreeMap<Id, i64> {
        let sql = "SELECT message_id, seen FROM handfast_inbox";
        let copies: Vec<(Id, i64)> = rows(&self.database, sql).await;
        copies.into_iter().collect()
    }
}

pub(crate) struct Scene {
    pub(crate) world: World,
}

impl Scene {
    /// Everything is well, and nobody consumes yet.
    pub(crate) async fn start() -> Self {
        Self::start_as(|_| None).await
    }

    /// The same with a service that reaches RabbitMQ as the closure says.
    pub(crate) async fn start_as(prepare: impl FnOnce(&RabbitMq) -> Option<String>) -> Self {
        let config = Config::empty()
            // A publisher confirm that somebody waited for in vain would take longer than
            // [`NOT_DELAYED_US`], so that it shows.
            .server("publisher_confirm_ms", 6_000)
            .server("lease_ms", 8_000)
            .server("resend_after_ms", 10_000)
            // Nobody answers there, so nothing is decided by a check.
            .producer(SOURCE, "127.0.0.1:1")
            .topic(TOPIC)
            .subscription(STEADY, TOPIC)
            .subscription(TROUBLED, TOPIC);
        let servers = Servers::own_rabbitmq();
        let detour = prepare(servers.rabbitmq.as_ref().unwrap());
        let mut world = World::bare_with_servers(Engines::Production, servers, config);
        if let Some(amqp) = detour {
            world.connect_service_to(amqp);
        }
        world.start(Party::Service).await;
        let scene = Self { world };
        scene.until_broker(BrokerState::Up).await;
        scene
    }

    pub(crate) fn rabbitmq(&mut self) -> &mut RabbitMq {
        self.world.servers.rabbitmq.as_mut().unwrap()
    }

    /// Runs `rabbitmqctl`.
    pub(crate) fn ctl(&mut self, words: &[&str]) {
        let ran = self.rabbitmq().ctl(words);
        ran.unwrap_or_else(|error| panic!("rabbitmqctl {words:?}: {error}"));
    }

    /// The queue of a subscription.
    pub(crate) fn queue(&self, subscription: &str) -> String {
        let (_, deployment) = self.world.rabbitmq();
        format!("{deployment}.{subscription}")
    }

    /// Somebody consumes a subscription.
    pub(crate) async fn sink(&self, subscription: &'static str) -> Sink {
        let database = self.world.own_database(subscription, KEPT).await;
        let consuming = self
            .world
            .consume(TOPIC, subscription, &database, Keep)
            .await;
        Sink {
            subscription,
            database,
            _consuming: consuming,
        }
    }

    /// Publishes so many facts in one call, which must be answered.
    pub(crate) async fn publish(&self, count: usize) -> Vec<Id> {
        let messages: Vec<_> = (0..count).map(|_| message(TOPIC)).collect();
        let ids = messages.iter().map(|message| message.id.clone()).collect();
        let request = PublishRequest {
            producer: SOURCE.to_owned(),
            messages,
        };
        let reply = self.world.messages().publish(request).await;
        for result in reply.expect("a publish is answered").into_inner().results {
            let outcome = result.outcome.expect("an outcome");
            assert!(
                matches!(outcome, item_result::Outcome::State(_)),
                "{outcome:?}"
            );
        }
        ids
    }

    /// Prepares and confirms one fact by hand.
    pub(crate) async fn prepare_and_confirm(&self) -> Id {
        let source = self.world.raw(SOURCE);
        let fact = message(TOPIC);
        assert_eq!(source.prepare(&fact).await, Ok(MessageState::Prepared));
        let confirmed = source.confirm(&fact.id).await;
        assert_eq!(confirmed, Ok(MessageState::Confirmed));
        fact.id
    }

    /// What an operator sees.
    pub(crate) async fn counts(&self) -> CountsResponse {
        let counts = self.world.console().counts(CountsRequest {}).await;
        counts.expect("counts are answered").into_inner()
    }

    /// Waits until an operator sees the broker like this.
    pub(crate) async fn until_broker(&self, state: BrokerState) -> BrokerCounts {
        eventually(format!("the broker is {state:?}"), SOON, async || {
            let broker = self.counts().await.broker.expect("a broker");
            if broker.state() == state {
                return Ok(broker);
            }
            Err(format!("{broker:?}"))
        })
        .await
    }

    /// Why nothing is sent to a queue, as an operator sees it.
    pub(crate) async fn trouble(&self, subscription: &str) -> String {
        let subscriptions = self.counts().await.subscriptions;
        let mut found = subscriptions
            .into_iter()
            .filter(|s| s.subscription == subscription);
        found.next().expect("it is counted").trouble
    }

    /// Why answers are not taken, as an operator sees it.
    pub(crate) async fn answers_trouble(&self) -> String {
        let broker = self.counts().await.broker.expect("a broker");
        broker.answers_trouble
    }

    /// Waits until an operator sees why nothing is sent to a queue.
    pub(crate) async fn until_trouble(&self, subscription: &str) -> String {
        eventually(format!("{subscription} is in trouble"), SOON, async || {
            let trouble = self.trouble(subscription).await;
            (!trouble.is_empty())
                .then_some(trouble)
                .ok_or_else(|| "no reason is shown".to_owned())
        })
        .await
    }

    /// The deliveries of these messages to a subscription.
    pub(crate) async fn deliveries(&self, subscription: &str, ids: &[Id]) -> Vec<Delivery> {
        let mut deliveries = self.world.books().await.deliveries;
        deliveries.retain(|d| d.subscription == subscription && ids.contains(&d.message_id));
        assert_eq!(deliveries.len(), ids.len());
        deliveries
    }

    /// Waits until these are consumed, and says how long it took.
    pub(crate) async fn until_consumed(
        &self,
        subscription: &str,
        ids: &[Id],
        deadline: Duration,
    ) -> Duration {
        let began = Instant::now();
        let what = format!("{subscription} has consumed {}", ids.len());
        eventually(what, deadline, async || {
            let deliveries = self.deliveries(subscription, ids).await;
            let mut open = deliveries.iter().filter(|d| d.state != "CONSUMED");
            let Some(next) = open.next() else {
                return Ok(());
            };
            let counts = self.counts().await;
            let left = 1 + open.count();
            Err(format!(
                "{left} are not, the first is {next:?}; {:?}; {:?}",
                counts.broker, counts.subscriptions
            ))
        })
        .await;
        began.elapsed()
    }

    /// For a while, nothing is claimed and nothing is counted.
    pub(crate) async fn untouched(&self, ids: &[Id]) {
        let time = Duration::from_secs(3);
        stays("nothing is claimed or counted", time, async || {
            for subscription in [STEADY, TROUBLED] {
                for delivery in self.deliveries(subscription, ids).await {
                    let seen = (delivery.generation, delivery.attempts);
                    if seen != (0, 0) || delivery.state != "PENDING" {
                        return Err(format!("{delivery:?}"));
                    }
                }
            }
            Ok(())
        })
        .await;
    }

    /// None of these took long from its confirm to its answer, and none has failed.
    pub(crate) async fn not_delayed(&self, subscription: &str, ids: &[Id]) {
        for delivery in self.deliveries(subscription, ids).await {
            let took = delivery.answered_at.expect("an answer") - delivery.confirmed_at;
            assert!(took < NOT_DELAYED_US, "{subscription}: {took} µs");
            assert_eq!(delivery.attempts, 0);
        }
    }

    /// Nothing was counted against anybody.
    pub(crate) async fn nothing_counted(&self) {
        let books = self.world.books().await;
        books.one_decision();
        for delivery in &books.deliveries {
            assert_eq!(delivery.attempts, 0, "{delivery:?}");
            assert_ne!(delivery.state, "DEAD", "{delivery:?}");
        }
    }
}
