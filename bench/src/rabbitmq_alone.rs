//! RabbitMQ alone at a fixed rate: the part of a latency that no message service can take away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicAckOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Confirmation};
use tokio::time::timeout;

use crate::Failure;
use crate::latency::{NONE, micros, note, number, numbered};
use crate::place::{Place, connect};
use crate::servers::Servers;
use crate::{bare, open_loop, topology};

/// The last message is waited for this long.
const LAST: Duration = Duration::from_secs(30);
/// Messages survive a restart of RabbitMQ.
const PERSISTENT: u8 = 2;

/// Publishes so many messages into a queue as the service declares them, one by one, and says for
/// each how many milliseconds after its time a consumer had it.
pub(crate) async fn run(
    servers: &Servers,
    count: u64,
    rate: u32,
    payload: usize,
) -> Result<Vec<f64>, Failure> {
    let place = Place::make(servers).await?;
    let names = topology::subscriptions(1);
    let queue = place.queue(&names[0]);
    let (publishing, consuming) = (connect(&place.amqp).await?, connect(&place.amqp).await?);
    bare::declare(&publishing, &queue).await?;
    let mut consumer = bare::consume(&consuming, &queue, 0).await?;
    let channel = publishing.create_channel().await;
    let channel = channel.map_err(Failure::of("open a channel"))?;
    let confirms = channel.confirm_select(ConfirmSelectOptions::default());
    confirms.await.map_err(Failure::of("ask for confirms"))?;
    let times: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(NONE)).collect());
    let zero = Instant::now();
    let consumed = {
        let times = Arc::clone(&times);
        async move {
            for _ in 0..count {
                let next = timeout(LAST, consumer.next()).await;
                let next = next.map_err(|_| Failure("RabbitMQ delivers nothing".to_owned()))?;
                let next = next.ok_or_else(|| Failure("RabbitMQ ended the consumer".to_owned()))?;
                let next = next.map_err(Failure::of("consume"))?;
                if let Some(number) = number(&next.data) {
                    note(&times, number, micros(zero.elapsed()));
                }
                let acked = next.ack(BasicAckOptions::default()).await;
                acked.map_err(Failure::of("ack"))?;
            }
            Ok::<(), Failure>(())
        }
    };
    let first = zero.elapsed() + Duration::from_millis(500);
    let due = move |number: u64| first + Duration::from_secs(1) * number as u32 / rate;
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let published = open_loop::run(zero, count, due, Duration::ZERO, move |number, go| {
        let (channel, queue) = (channel.clone(), queue.clone());
        let properties = properties.clone();
        async move {
            let body = numbered(number, payload);
            go.await.map_err(Failure::of("wait for a message's time"))?;
            let options = BasicPublishOptions::default();
            let confirm = channel
                .basic_publish("".into(), queue.into(), options, &body, properties)
                .await
                .map_err(Failure::of("publish"))?;
            match confirm.await.map_err(Failure::of("publish"))? {
                Confirmation::Ack(_) => Ok(()),
                other => Err(Failure(format!(
                    "RabbitMQ did not take a message: {other:?}"
                ))),
            }
        }
    });
    let (published, consumed) = tokio::join!(published, consumed);
    published?;
    consumed?;
    place.remove(servers, &names).await?;
    let late = |(number, time): (usize, &AtomicU64)| {
        let due = micros(due(number as u64));
        time.load(Ordering::SeqCst).saturating_sub(due) as f64 / 1_000.0
    };
    Ok(times.iter().enumerate().map(late).collect())
}
