//! Consumers that speak RabbitMQ by hand: one that answers only what it is told to, on its
//! own, and one that does so on either pair of engines.

use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery as Received;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use uuid::Uuid;

use crate::clients::RawConsumer;
use crate::home::{Engines, hang_up};
use crate::wait::eventually;
use crate::world::World;

const PATIENCE: Duration = Duration::from_secs(40);
const SOON: Duration = Duration::from_secs(15);
/// The most that RabbitMQ gives to one consumer of a quorum queue.
const PREFETCH: u16 = 2_000;

/// What came for a subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The id of its message.
    pub message_id: Vec<u8>,
    /// Number of the send.
    pub generation: i64,
    /// What was prepared.
    pub payload: Vec<u8>,
}

/// A consumer that takes one thing after the other and calls each CONSUMED.
#[expect(missing_debug_implementations, reason = "connections are not printed")]
pub enum Reader {
    /// On a stream of the service.
    Stream(RawConsumer),
    /// At a queue of RabbitMQ.
    Queue(QueueConsumer),
}

impl Reader {
    /// The next, consumed.
    pub async fn takes(&mut self) -> Fact {
        match self {
            Self::Stream(stream) => {
                let delivery = stream.next().await;
                stream.consumed(&delivery).await;
                Fact {
                    message_id: delivery.message_id,
                    generation: delivery.generation.into(),
                    payload: delivery.payload.to_vec(),
                }
            }
            Self::Queue(queue) => {
                let (fact, tag) = queue.next().await;
                queue.consumed(&fact, tag).await;
                fact
            }
        }
    }
}

/// Reads a queue with nothing but an AMQP client.
#[expect(missing_debug_implementations, reason = "connections are not printed")]
pub struct QueueConsumer {
    connection: Connection,
    channel: Channel,
    stream: lapin::Consumer,
    subscription: String,
    acknowledge: String,
}

impl QueueConsumer {
    /// Consumes from the queue of a subscription, once it is there.
    pub async fn open(url: &str, deployment: &str, subscription: &str, prefetch: u16) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default());
        let connection = connection.await.expect("RabbitMQ is there");
        let queue = format!("{deployment}.{subscription}");
        until_declared(&connection, &queue).await;
        let channel = connection.create_channel().await.expect("a channel");
        let confirm = ConfirmSelectOptions::default();
        channel.confirm_select(confirm).await.expect("confirms");
        let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
        qos.await.expect("a prefetch");
        let consumed = channel.basic_consume(
            queue.as_str().into(),
            "by-hand".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        Self {
            stream: consumed.await.expect("a consumer"),
            connection,
            channel,
            subscription: subscription.to_owned(),
            acknowledge: format!("{deployment}.acknowledge"),
        }
    }

    /// The next delivery and its tag, if it comes within this time.
    pub async fn next_within(&mut self, time: Duration) -> Option<(Fact, u64)> {
        let next = tokio::time::timeout(time, self.stream.next()).await;
        let received = next.ok()?.expect("the queue is there").expect("a delivery");
        Some((fact(&received), received.delivery_tag))
    }

    /// The next delivery and its tag.
    pub async fn next(&mut self) -> (Fact, u64) {
        let next = self.next_within(SOON).await;
        next.unwrap_or_else(|| panic!("{} got nothing", self.subscription))
    }

    /// What is there, at most so many, once there is something within this time.
    pub async fn batch_within(&mut self, most: usize, time: Duration) -> Vec<(Fact, u64)> {
        let mut batch = Vec::from_iter(self.next_within(time).await);
        while !batch.is_empty()
            && batch.len() < most
            && let Some(Some(received)) = self.stream.next().now_or_never()
        {
            let received = received.expect("a delivery");
            batch.push((fact(&received), received.delivery_tag));
        }
        batch
    }

    /// Answers CONSUMED, and then says so to RabbitMQ.
    pub async fn consumed(&self, fact: &Fact, tag: u64) {
        self.all_consumed(&[(fact.clone(), tag)]).await;
    }

    /// Answers CONSUMED for at most 500, everything up to the last one.
    pub async fn all_consumed(&self, batch: &[(Fact, u64)]) {
        let answer = |(fact, _): &(Fact, u64)| {
            let id = Uuid::from_slice(&fact.message_id).expect("an id");
            serde_json::json!({
                "message_id": id.to_string(),
                "generation": fact.generation,
                "answer": "CONSUMED",
            })
        };
        let Some((_, last)) = batch.last() else {
            return;
        };
        let body = serde_json::json!({
            "subscription": self.subscription,
            "answers": batch.iter().map(answer).collect::<Vec<_>>(),
        })
        .to_string();
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(2);
        let published = self.channel.basic_publish(
            "".into(),
            self.acknowledge.as_str().into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            body.as_bytes(),
            properties,
        );
        let confirm = published.await.expect("an answer is sent").await;
        assert_eq!(confirm.expect("an answer is kept"), Confirmation::Ack(None));
        let acked = self
            .channel
            .basic_ack(*last, BasicAckOptions { multiple: true });
        acked.await.expect("an ack");
    }

    /// Hangs up; what was not answered goes back to the queue.
    pub async fn close(self) {
        hang_up(self.connection).await;
    }
}

/// Waits until a queue is there, and says how many messages wait in it.
async fn until_declared(connection: &Connection, queue: &str) -> u32 {
    eventually(format!("the queue {queue}"), PATIENCE, async || {
        let channel = connection.create_channel().await;
        let channel = channel.map_err(|error| error.to_string())?;
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = channel.queue_declare(queue.into(), passive, FieldTable::default());
        let declared = declared.await.map_err(|error| error.to_string())?;
        // It ends with the connection at the latest.
        let _ = channel.close(200, "done".into()).await;
        Ok(declared.message_count())
    })
    .await
}

fn fact(received: &Received) -> Fact {
    let properties = &received.properties;
    let id = properties.message_id().as_ref().expect("an id");
    let headers = properties.headers().as_ref().expect("headers");
    let generation = match headers.inner().get("handfast-generation") {
        Some(AMQPValue::LongInt(number)) => i64::from(*number),
        Some(AMQPValue::LongLongInt(number)) => *number,
        other => panic!("a generation is a number, not {other:?}"),
    };
    let id: Uuid = id.as_str().parse().expect("an id");
    Fact {
        message_id: id.as_bytes().to_vec(),
        generation,
        payload: received.data.clone(),
    }
}

impl World {
    /// Consumes by hand.
    pub async fn reader(&self, topic: &str, subscription: &str) -> Reader {
        match self.engines() {
            Engines::Embedded => {
                Reader::Stream(RawConsumer::open(self.deliveries(), topic, subscription, 100).await)
            }
            Engines::Production => Reader::Queue(self.queue_consumer(subscription).await),
        }
    }

    /// Deletes the queue of a subscription, with what is in it, if somebody consumes it.
    ///
    /// RabbitMQ 3.10 cannot make a queue again for a long time (`cluster_not_formed`) if it was
    /// deleted while it was being made; one with a consumer is made.
    pub async fn delete_queue_in_use(&self, subscription: &str) {
        let (url, deployment) = self.rabbitmq();
        let connection = Connection::connect(&url, ConnectionProperties::default());
        let connection = connection.await.expect("RabbitMQ is there");
        let channel = connection.create_channel().await.expect("a channel");
        let queue = format!("{deployment}.{subscription}");
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = channel.queue_declare(queue.as_str().into(), passive, FieldTable::default());
        if declared
            .await
            .is_ok_and(|declared| declared.consumer_count() > 0)
        {
            let options = QueueDeleteOptions::default();
            let deleted = channel.queue_delete(queue.as_str().into(), options);
            deleted.await.expect("a queue is deleted");
        }
        hang_up(connection).await;
    }

    /// Deletes the queue of a subscription, with what is in it.
    pub async fn delete_queue(&self, subscription: &str) {
        let (url, deployment) = self.rabbitmq();
        let connection = Connection::connect(&url, ConnectionProperties::default());
        let connection = connection.await.expect("RabbitMQ is there");
        let channel = connection.create_channel().await.expect("a channel");
        let queue = format!("{deployment}.{subscription}");
        let deleted = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
        deleted.await.expect("a queue is deleted");
        hang_up(connection).await;
    }

    /// How many messages wait in the queue of a subscription, without those that consumers hold.
    pub async fn waiting(&self, subscription: &str) -> u32 {
        let (url, deployment) = self.rabbitmq();
        let connection = Connection::connect(&url, ConnectionProperties::default());
        let connection = connection.await.expect("RabbitMQ is there");
        let waiting = until_declared(&connection, &format!("{deployment}.{subscription}")).await;
        hang_up(connection).await;
        waiting
    }

    /// Reads the queue of a subscription.
    pub async fn queue_consumer(&self, subscription: &str) -> QueueConsumer {
        let (url, deployment) = self.rabbitmq();
        QueueConsumer::open(&url, &deployment, subscription, PREFETCH).await
    }
}
