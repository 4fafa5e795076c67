//! The queues: made ahead of use, never changed, looked at.
//!
//! A server answers a wrong declare by closing the channel, so each step has one of its own.

use std::future::Future;
use std::time::Duration;

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::protocol::AMQPError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Queue};
use tokio::time::timeout;
use uuid::Uuid;

use super::error::{ACCESS_REFUSED, Error, INEQUIVALENT, NOT_FOUND, refusal, text};
use super::link::{Opened, STEP};
use super::queues::Seen;

/// How often a message comes back from consumers that end over it before RabbitMQ drops it.
/// Our row brings it back on its schedule.
const DELIVERY_LIMIT: i32 = 5;
/// How long a look may take.
const LOOK: Duration = Duration::from_secs(1);

/// What a declare found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Declared {
    /// It is there, with our arguments.
    Exists,
    /// It is there with others; the text names the argument and says what to do.
    Differs(String),
}

/// Sees to it that a subscription's queue is there.
pub(super) async fn queue(opened: &Opened, name: &str) -> Result<Declared, Error> {
    let mut arguments = quorum();
    arguments.insert(
        "x-delivery-limit".into(),
        AMQPValue::LongInt(DELIVERY_LIMIT),
    );
    declare(opened, name, arguments).await
}

/// Sees to it that the queue of answers is there.
pub(super) async fn acknowledge(opened: &Opened, name: &str) -> Result<Declared, Error> {
    declare(opened, name, quorum()).await
}

/// Marks the deployment's names as this store's, or says whose they are. Nothing is ever sent
/// to this queue: RabbitMQ refuses to declare it again with other arguments, and that is all it
/// is for.
pub(super) async fn mark(
    opened: &Opened,
    name: &str,
    store: Uuid,
) -> Result<Result<(), String>, Error> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), longstr(""));
    arguments.insert(
        "x-dead-letter-routing-key".into(),
        longstr(&store.to_string()),
    );
    Ok(match declare(opened, name, arguments).await? {
        Declared::Exists => Ok(()),
        Declared::Differs(why) => Err(why),
    })
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), longstr("quorum"));
    arguments
}

fn longstr(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

async fn declare(opened: &Opened, name: &str, arguments: FieldTable) -> Result<Declared, Error> {
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let declared = on_a_channel(opened, STEP, |channel: Channel| async move {
        channel.queue_declare(name.into(), options, arguments).await
    });
    match declared.await {
        Ok(_) => Ok(Declared::Exists),
        Err(Error::Lapin(error)) => match refusal(&error).map(AMQPError::get_id) {
            Some(INEQUIVALENT) => Ok(Declared::Differs(text(&error))),
            // Somebody else made it, and we may use it all the same.
            Some(ACCESS_REFUSED) => match look(opened, name).await {
                Ok(Some(_)) => Ok(Declared::Exists),
                Ok(None) | Err(_) => Err(error.into()),
            },
            _ => Err(error.into()),
        },
        Err(error) => Err(error),
    }
}

/// What is in a queue; `None` if it is missing. An answer is not waited for as long as one that
/// is needed.
pub(super) async fn look(opened: &Opened, name: &str) -> Result<Option<Seen>, Error> {
    let options = QueueDeclareOptions {
        passive: true,
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let looked = on_a_channel(opened, LOOK, |channel: Channel| async move {
        channel
            .queue_declare(name.into(), options, FieldTable::default())
            .await
    });
    match looked.await {
        Ok(queue) => Ok(Some(seen(&queue))),
        Err(Error::Lapin(error)) if refusal(&error).is_some_and(|e| e.get_id() == NOT_FOUND) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Deletes a queue. Whether it may be is the caller's to know: quorum queues do not check.
pub(super) async fn delete(opened: &Opened, name: &str) -> Result<(), Error> {
    on_a_channel(opened, STEP, |channel: Channel| async move {
        channel
            .queue_delete(name.into(), QueueDeleteOptions::default())
            .await
    })
    .await
    .map(|_| ())
}

fn seen(queue: &Queue) -> Seen {
    Seen {
        waiting: queue.message_count().into(),
        consumers: queue.consumer_count(),
    }
}

/// One step on a channel of its own, in a bounded time. A queue that does not answer makes the
/// channel useless, so it is never used again.
async fn on_a_channel<T, F>(
    opened: &Opened,
    within: Duration,
    step: impl FnOnce(Channel) -> F,
) -> Result<T, Error>
where
    F: Future<Output = lapin::Result<T>>,
{
    let channel = opened.channel().await?;
    let done = match timeout(within, step(channel.clone())).await {
        Ok(done) => done?,
        Err(_) => return Err(Error::timed_out("get an answer from the queue", within)),
    };
    // A server that does not answer any more is met by the next step.
    let _ = timeout(STEP, channel.close(200, "done".into())).await;
    Ok(done)
}
