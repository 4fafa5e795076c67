//! The source that is RabbitMQ: deliveries from the subscription's queue, answers to the queue
//! `<deployment>.acknowledge`.
//!
//! Two tasks have a connection each, because RabbitMQ stops reading a connection whose
//! publishing it blocks, and acks on it would stand still too. [`receive`] owns the channel
//! that consumes and acks; [`record`] owns the channel that publishes answers. A delivery is
//! acked to RabbitMQ only when its answer is confirmed: what is lost in between comes again,
//! and the inbox answers for it.
//!
//! Nothing is ever declared here. The service declares; what is missing is waited for.

mod address;
mod company;
mod door;
mod held;
mod receive;
mod record;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use lapin::types::ShortString;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::address::Address;
use self::company::Company;
use self::door::Door;
use self::held::Held;
use super::{Link, Order, Recorded};
use crate::error::Error;

/// For one command to RabbitMQ, and for its confirm of an answer.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// For the end of a connection that is closed in good order.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest wait before the next try.
const LAST_BACKOFF: Duration = Duration::from_secs(2);
/// The longest name of a deployment, so that every queue's name fits into AMQP's 255 bytes.
const MAX_DEPLOYMENT_BYTES: usize = 100;

/// RabbitMQ as source; made by [`rabbitmq()`].
#[derive(Clone)]
pub struct RabbitMq {
    addresses: String,
    deployment: String,
}

/// RabbitMQ, at an address such as `amqp://user:password@127.0.0.1:5672/%2f` or at several,
/// separated by commas, of which each next one is tried when one is away. The queues are those
/// of the deployment `handfast` unless [`deployment`](RabbitMq::deployment) names another.
pub fn rabbitmq(addresses: impl Into<String>) -> RabbitMq {
    RabbitMq {
        addresses: addresses.into(),
        deployment: "handfast".to_owned(),
    }
}

impl RabbitMq {
    /// The deployment of the service, as in its configuration: every queue's name begins with
    /// it. At most 100 bytes.
    #[must_use]
    pub fn deployment(mut self, name: impl Into<String>) -> Self {
        self.deployment = name.into();
        self
    }

    pub(super) fn broker(&self) -> Result<Broker, Error> {
        if self.deployment.is_empty() || self.deployment.len() > MAX_DEPLOYMENT_BYTES {
            return Err(Error::Option {
                name: "deployment",
                value: self.deployment.clone(),
                range: "1 to 100 bytes",
            });
        }
        Ok(Broker {
            addresses: Address::read_all(&self.addresses)?,
            deployment: self.deployment.clone(),
        })
    }
}

impl fmt::Debug for RabbitMq {
    /// Leaves out what may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq")
            .field("deployment", &self.deployment)
            .finish_non_exhaustive()
    }
}

/// A deployment on RabbitMQ; nothing is connected yet.
pub(crate) struct Broker {
    addresses: Vec<Address>,
    deployment: String,
}

impl Broker {
    pub(crate) fn open(self, order: Order) -> Link {
        let prefetch = order.prefetch as usize;
        // Neither is ever full: there are no more deliveries, and so no more answers, than
        // the prefetch allows.
        let (deliveries_in, deliveries) = mpsc::channel(prefetch);
        let (answers, answers_out) = mpsc::channel(prefetch);
        // Not bounded by itself: it carries the keys of answers, which are.
        let (recorded_in, recorded) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let done = Arc::new(Recorded::default());
        let held = Arc::new(AtomicUsize::new(0));
        let door = |what| Door::new(self.addresses.clone(), format!("{} {what}", order.consumer));
        let recorder = record::Record {
            door: door("answers"),
            acknowledge: queue(&self.deployment, "acknowledge"),
            subscription: order.subscription.clone(),
            answers: answers_out,
            company: Company::new(
                (prefetch / 4).clamp(1, record::MAX_WAITING),
                Arc::clone(&held),
            ),
            recorded: recorded_in,
            done: Arc::clone(&done),
        };
        let receiver = receive::Receive {
            door: door("deliveries"),
            queue: queue(&self.deployment, &order.subscription),
            held: Held::new(order.prefetch, held),
            order,
            deliveries: deliveries_in,
            recorded,
            stop: stop.clone(),
            unreadable: receive::Unreadable::new(Arc::clone(&done)),
        };
        Link {
            deliveries,
            answers,
            stop,
            recorded: done,
            recorder: AbortOnDropHandle::new(tokio::spawn(recorder.run())),
            receiver: AbortOnDropHandle::new(tokio::spawn(receiver.run())),
        }
    }
}

/// A queue's name. Its two parts have at most 100 bytes each, so that it is short enough.
fn queue(deployment: &str, name: &str) -> ShortString {
    ShortString::try_new(format!("{deployment}.{name}")).unwrap_or_default()
}
