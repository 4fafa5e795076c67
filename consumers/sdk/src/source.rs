//! Where deliveries come from and answers go to: the port.
//!
//! The rest of the SDK sees a [`Link`] and never learns what carries it.

mod handfast;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::Error;
use crate::message::{Answered, Delivered};

/// What carries messages to this consumer. See [`handfast()`].
#[derive(Clone, Debug)]
pub struct Source(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Handfast { address: String },
}

/// The service itself, at an address such as `http://127.0.0.1:7400`: deliveries come on a
/// stream, answers go back by calls.
pub fn handfast(address: impl Into<String>) -> Source {
    Source(Kind::Handfast {
        address: address.into(),
    })
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
}

/// A source whose address was understood; nothing is connected yet.
pub(crate) enum Opener {
    Handfast(handfast::Service),
}

impl Source {
    pub(crate) fn opener(&self) -> Result<Opener, Error> {
        match &self.0 {
            Kind::Handfast { address } => handfast::Service::new(address).map(Opener::Handfast),
        }
    }
}

impl Opener {
    pub(crate) fn open(self, order: Order) -> Link {
        match self {
            Self::Handfast(service) => service.open(order),
        }
    }
}
