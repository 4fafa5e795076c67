//! A service that does what a test tells it, over a real RabbitMQ.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use handfast_consumer::{RabbitMq, rabbitmq};
use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;

use super::PATIENCE;

/// A queue that a test leaves behind goes by itself.
const QUEUE_EXPIRES_MS: i64 = 120_000;

/// The address of the RabbitMQ that tests use.
pub(crate) fn address() -> String {
    let Ok(url) = std::env::var("HANDFAST_TEST_AMQP") else {
        panic!("HANDFAST_TEST_AMQP is not set; run `cargo xtask test`, or name a server");
    };
    url
}

/// A deployment of a test's own.
pub(crate) struct Rabbit {
    deployment: String,
    now: i64,
    channel: Channel,
    seen: Arc<Seen>,
    connection: Connection,
}

/// Another consumer, which holds what it does not answer.
pub(crate) struct Other {
    connection: Connection,
    /// What it took goes back when this closes.
    _channel: Channel,
}

impl Other {
    pub(crate) async fn vanish(self) {
        // lapin may end its own loop before it says that RabbitMQ has closed; then nobody answers.
        let close = self.connection.close(200, "OK".into());
        let _ = timeout(Duration::from_secs(2), close).await;
    }
}

struct Seen {
    answers: Mutex<Vec<Answer>>,
    changed: watch::Sender<()>,
}

/// One answer as it was on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) number: u128,
    pub(crate) generation: i64,
    pub(crate) sent_at: i64,
    pub(crate) word: String,
    pub(crate) reason: Option<String>,
    pub(crate) after_ms: Option<i64>,
}

impl Rabbit {
    /// Nothing is declared yet.
    pub(crate) async fn new(now: i64) -> Self {
        let connection = Connection::connect(&address(), ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let confirm = ConfirmSelectOptions::default();
        channel.confirm_select(confirm).await.unwrap();
        Self {
            deployment: format!("test-{}", Uuid::new_v4().simple()),
            now,
            channel,
            seen: Arc::new(Seen {
                answers: Mutex::default(),
                changed: watch::channel(()).0,
            }),
            connection,
        }
    }

    /// With its two queues.
    pub(crate) async fn declared(now: i64) -> Self {
        let rabbit = Self::new(now).await;
        rabbit.declare_deliveries().await;
        rabbit.declare_answers().await;
        rabbit
    }

    pub(crate) fn source(&self) -> RabbitMq {
        self.source_at(&address())
    }

    pub(crate) fn source_at(&self, addresses: &str) -> RabbitMq {
        rabbitmq(addresses).deployment(&self.deployment)
    }

    fn queue(&self, name: &str) -> ShortString {
        format!("{}.{name}", self.deployment).into()
    }

    async fn declare(&self, name: &str, delivery_limit: bool) {
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString(LongString::from("quorum"));
        arguments.insert("x-queue-type".into(), quorum);
        let expires = AMQPValue::LongLongInt(QUEUE_EXPIRES_MS);
        arguments.insert("x-expires".into(), expires);
        if delivery_limit {
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(5));
        }
        self.channel
            .queue_declare(self.queue(name), QueueDeclareOptions::durable(), arguments)
            .await
            .unwrap();
    }

    pub(crate) async fn declare_deliveries(&self) {
        self.declare("accounting", true).await;
    }

    /// Declares the queue of answers and reads it.
    pub(crate) async fn declare_answers(&self) {
        self.declare("acknowledge", false).await;
        let channel = self.connection.create_channel().await.unwrap();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let mut consumer = channel
            .basic_consume(
                self.queue("acknowledge"),
                "test".into(),
                options,
                FieldTable::default(),
            )
            .await
            .unwrap();
        let seen = Arc::clone(&self.seen);
        tokio::spawn(async move {
            // It keeps its channel open.
            let _channel = channel;
            while let Some(Ok(delivery)) = consumer.next().await {
                let properties = &delivery.properties;
                let user = properties.user_id().as_ref().map(ShortString::as_str);
                assert_eq!(user, Some("guest"));
                let content_type = properties.content_type().as_ref();
                assert_eq!(content_type.unwrap().as_str(), "application/json");
                assert_eq!(*properties.delivery_mode(), Some(2));
                let answers = read(&delivery.data);
                seen.answers.lock().unwrap().extend(answers);
                seen.changed.send_replace(());
            }
        });
    }

    pub(crate) async fn delete_deliveries(&self) {
        self.channel
            .queue_delete(self.queue("accounting"), QueueDeleteOptions::default())
            .await
            .unwrap();
    }

    /// The properties of a delivery by the contract.
    pub(crate) fn properties(&self, number: u128, generation: i32) -> BasicProperties {
        let text = |text: &str| AMQPValue::LongString(LongString::from(text));
        let mut headers = FieldTable::default();
        headers.insert("handfast-subscription".into(), text("accounting"));
        headers.insert("handfast-key".into(), text("the key"));
        headers.insert("handfast-generation".into(), AMQPValue::LongInt(generation));
        let sent_at = AMQPValue::LongLongInt(self.now + 7);
        headers.insert("handfast-sent-at".into(), sent_at);
        let first_sent_at = AMQPValue::LongLongInt(self.now);
        headers.insert("handfast-first-sent-at".into(), first_sent_at);
        BasicProperties::default()
            .with_message_id(Uuid::from_u128(number).to_string().into())
            .with_type("payment.completed".into())
            .with_app_id("payment".into())
            .with_delivery_mode(2)
            .with_headers(headers)
    }

    pub(crate) async fn deliver(&self, number: u128, word: &str) {
        self.send(vec![(self.properties(number, 1), word)]).await;
    }

    pub(crate) async fn deliver_all(&self, numbers: impl IntoIterator<Item = u128>) {
        let messages = numbers
            .into_iter()
            .map(|number| (self.properties(number, 1), "ok"))
            .collect();
        self.send(messages).await;
    }

    /// Publishes to the subscription's queue.
    pub(crate) async fn send(&self, messages: Vec<(BasicProperties, &str)>) {
        let mut confirms = Vec::new();
        for (properties, word) in messages {
            let published = self
                .channel
                .basic_publish(
                    "".into(),
                    self.queue("accounting"),
                    BasicPublishOptions::default(),
                    word.as_bytes(),
                    properties,
                )
                .await;
            confirms.push(published.unwrap());
        }
        for confirm in confirms {
            assert_eq!(confirm.await.unwrap(), Confirmation::Ack(None));
        }
    }

    /// How many messages wait in the subscription's queue, and how many consumers it has.
    pub(crate) async fn queue_state(&self) -> (u32, u32) {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = self
            .channel
            .queue_declare(self.queue("accounting"), passive, FieldTable::default())
            .await
            .unwrap();
        (queue.message_count(), queue.consumer_count())
    }

    /// Waits for these numbers of messages and consumers.
    pub(crate) async fn until_queue(&self, messages: u32, consumers: u32) {
        let mut found = None;
        let wait = tokio::time::timeout(PATIENCE, async {
            while found != Some((messages, consumers)) {
                found = Some(self.queue_state().await);
                tokio::task::yield_now().await;
            }
        });
        let met = wait.await.is_ok();
        assert!(
            met,
            "messages and consumers: {found:?}, not {messages} and {consumers}"
        );
    }

    /// Somebody else takes so many messages and does not answer.
    pub(crate) async fn hold(&self, count: usize) -> Other {
        let connection = Connection::connect(&address(), ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let mut consumer = channel
            .basic_consume(
                self.queue("accounting"),
                "other".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        for _ in 0..count {
            consumer.next().await.unwrap().unwrap();
        }
        // So that what follows is not for it.
        channel
            .basic_cancel("other".into(), BasicCancelOptions::default())
            .await
            .unwrap();
        Other {
            connection,
            _channel: channel,
        }
    }

    /// The same, and then it is gone.
    pub(crate) async fn hold_and_vanish(&self, count: usize) {
        self.hold(count).await.vanish().await;
        let count = u32::try_from(count).unwrap();
        self.until_queue(count, 0).await;
    }

    /// Takes a message out of the subscription's queue.
    pub(crate) async fn get(&self) -> Option<BasicGetMessage> {
        let no_ack = BasicGetOptions { no_ack: true };
        let queue = self.queue("accounting");
        self.channel.basic_get(queue, no_ack).await.unwrap()
    }

    pub(crate) fn answers(&self) -> Vec<Answer> {
        self.seen.answers.lock().unwrap().clone()
    }

    /// The words on message `number`, oldest first.
    pub(crate) fn words(&self, number: u128) -> Vec<String> {
        self.answers()
            .into_iter()
            .filter(|answer| answer.number == number)
            .map(|answer| answer.word)
            .collect()
    }

    pub(crate) async fn until_answers(&self, count: usize) {
        let mut changed = self.seen.changed.subscribe();
        let wait = changed.wait_for(|()| self.seen.answers.lock().unwrap().len() >= count);
        let met = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(met, "{} of {count} answers", self.answers().len());
    }
}

/// Reads a message of answers as strictly as the contract is.
fn read(body: &[u8]) -> Vec<Answer> {
    let message: serde_json::Value = serde_json::from_slice(body).unwrap();
    assert_eq!(message["subscription"], "accounting");
    let answers = message["answers"].as_array().unwrap();
    assert!((1..=500).contains(&answers.len()));
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    answers
        .iter()
        .map(|answer| Answer {
            number: Uuid::parse_str(answer["message_id"].as_str().unwrap())
                .unwrap()
                .as_u128(),
            generation: answer["generation"].as_i64().unwrap(),
            sent_at: answer["sent_at"].as_i64().unwrap(),
            word: text(&answer["answer"]).unwrap(),
            reason: text(&answer["reason"]),
            after_ms: answer["after_ms"].as_i64(),
        })
        .collect()
}
