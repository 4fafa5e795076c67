//! Where deliveries come from and answers go to: the port.
//!
//! The rest of the SDK sees a [`Link`] and never learns what carries it.

mod handfast;
mod rabbitmq;
mod reachable;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::Error;
use crate::message::{Answered, Delivered};

pub use rabbitmq::{RabbitMq, rabbitmq};

/// Where the service cuts a reason.
const MAX_REASON_BYTES: usize = 1_000;
/// The longest LATER that the service takes.
const MAX_LATER: Duration = Duration::from_secs(7 * 24 * 3600);

/// What carries messages to this consumer: [`handfast()`] or [`rabbitmq()`].
#[derive(Clone, Debug)]
pub struct Source(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Handfast { address: String },
    RabbitMq(RabbitMq),
}

/// The service itself, at an address such as `http://127.0.0.1:7400`: deliveries come on a
/// stream, answers go back by calls.
pub fn handfast(address: impl Into<String>) -> Source {
    Source(Kind::Handfast {
        address: address.into(),
    })
}

impl From<RabbitMq> for Source {
    fn from(rabbitmq: RabbitMq) -> Self {
        Self(Kind::RabbitMq(rabbitmq))
    }
}

/// What a consumer asks of its source.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) topic: String,
    pub(crate) subscription: String,
    /// A name for logs and people.
    pub(crate) consumer: String,
    /// How many deliveries may be without a recorded answer.
    pub(crate) prefetch: u32,
}

/// An open source, which reconnects by itself.
pub(crate) struct Link {
    /// Never holds more than the prefetch. It ends after `stop`, when everything that was
    /// delivered is answered and recorded.
    pub(crate) deliveries: mpsc::Receiver<Delivered>,
    /// Exactly one per delivery.
    pub(crate) answers: mpsc::Sender<Answered>,
    /// Ends the credit: nothing new is asked for.
    pub(crate) stop: CancellationToken,
    /// Ends when every answer is recorded and nobody can send another.
    pub(crate) recorder: AbortOnDropHandle<()>,
    /// Counts what became of the answers.
    pub(crate) recorded: Arc<Recorded>,
    /// Feeds `deliveries`.
    pub(crate) receiver: AbortOnDropHandle<()>,
}

/// What became of the answers.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) recorded: AtomicU64,
    pub(crate) no_such_delivery: AtomicU64,
    pub(crate) refused: AtomicU64,
    /// Not an answer: deliveries that could not be read and were thrown away.
    pub(crate) unreadable: AtomicU64,
}

/// A source whose address was understood; nothing is connected yet.
pub(crate) enum Opener {
    Handfast(handfast::Service),
    RabbitMq(rabbitmq::Broker),
}

impl Source {
    pub(crate) fn opener(&self) -> Result<Opener, Error> {
        match &self.0 {
            Kind::Handfast { address } => handfast::Service::new(address).map(Opener::Handfast),
            Kind::RabbitMq(rabbitmq) => rabbitmq.broker().map(Opener::RabbitMq),
        }
    }
}

impl Opener {
    pub(crate) fn open(self, order: Order) -> Link {
        match self {
            Self::Handfast(service) => service.open(order),
            Self::RabbitMq(broker) => broker.open(order),
        }
    }
}

/// A reason as long as the service keeps it, cut between two characters.
fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(MAX_REASON_BYTES)]
}
