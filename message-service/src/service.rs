//! The verbs: what producers, consumers and operators may ask for.
//!
//! This is where a call is admitted, refused early, or carried out against the store. What
//! was carried out is durable when a verb returns; the signals that follow (the broker, the
//! mark "answered through") are only latency.
//!
//! **A verb outlives its caller.** A handler is dropped when its client goes away, and a
//! store call must not end half-way because of that. So all work runs in tasks of its own,
//! and the permits that bound it move into them.
//!
//! It knows nothing of gRPC: [`crate::api`] parses, asks here, and converts the answer back.

mod backlog;
mod console;
mod error;
mod failure;
mod gate;
mod reachability;
mod refusal;
pub mod timeline;
mod undecided;
mod verbs;

use std::sync::Arc;

use crate::answered::Answered;
use crate::broker::Broker;
use crate::message::Limits;
use crate::store::{self, Store};
use crate::topology;

use backlog::Backlog;
use failure::Failures;
use gate::Gate;
use undecided::Undecided;

pub use crate::broker::{BrokerState, QueueState, embedded};
pub use crate::message::{
    Answer, AnswerKind, DeliveryState, Invalid, MessageEvent, MessageId, MessageState, NewMessage,
    Timestamp, WrongState, limits,
};
pub use crate::store::{
    AnswerOutcome, DecidedBy, DeliveryCursor, DeliveryView, MessageFilter, MessageView, Refusal,
    ReplicaView, SubscriptionCounts,
};
pub use console::{Body, CountsView, Page, ShownMessage};
pub use error::Error;
pub use reachability::Reachability;
pub use timeline::TimelineEntry;

/// Verbs that end something, and reads of producers: together at most this many bytes, and
/// each at least [`ENDING_CALL_BYTES`], so at most 2,048 calls.
const ENDING_BYTES: usize = 32 * 1024 * 1024;
/// What a small call costs at that gate.
const ENDING_CALL_BYTES: usize = 16 * 1024;
/// Reads of the console at a time; people can wait, producers should not wait for them.
const CONSOLE_CALLS: usize = 16;
/// What a small call costs at the gate of bodies.
const BODY_CALL_BYTES: usize = 1024;

/// What an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How large a message may be.
    pub limits: Limits,
    /// Bytes of prepare and publish calls that are in flight, from decoding to the reply.
    pub inflight_bytes: usize,
    /// Undecided messages that one producer may have.
    pub max_undecided: u64,
    /// Bytes of messages that may be unfinished before prepare and publish are refused.
    pub max_backlog_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            inflight_bytes: 32 * 1024 * 1024,
            max_undecided: 100_000,
            max_backlog_bytes: 16 * 1024 * 1024 * 1024,
        }
    }
}

/// What became of one item of a list; the other items are not touched by it.
pub type ItemResult<T> = Result<T, Error>;

/// A list of messages that a producer hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The calling producer.
    pub producer: String,
    /// The items in order, each as far as it could be read.
    pub messages: Vec<Result<NewMessage, Invalid>>,
    /// What the items take on the wire.
    pub bytes: usize,
}

/// A list of ids that a producer decides or asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The calling producer.
    pub producer: String,
    /// The items in order, each as far as it could be read.
    pub ids: Vec<Result<MessageId, Invalid>>,
    /// What the items take on the wire.
    pub bytes: usize,
}

/// A list of answers from a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers {
    /// For whom the consumer speaks.
    pub subscription: String,
    /// The items in order; `None` where no message can have the id that was sent.
    pub answers: Vec<Result<Option<Answer>, Invalid>>,
    /// What the items take on the wire.
    pub bytes: usize,
}

/// What a producer may see of one of its messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The message.
    pub message: MessageView,
    /// Its deliveries by subscription.
    pub deliveries: Vec<DeliveryView>,
}

/// The verbs over one store and one broker.
pub struct Service {
    store: Arc<dyn Store>,
    topology: Arc<topology::Snapshot>,
    broker: Arc<dyn Broker>,
    answered: Arc<Answered>,
    reachability: Arc<Reachability>,
    limits: Limits,
    max_undecided: u64,
    bodies: Gate,
    ending: Gate,
    console: Gate,
    undecided: Undecided,
    backlog: Arc<Backlog>,
    failures: Failures,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("limits", &self.limits)
            .field("max_undecided", &self.max_undecided)
            .finish_non_exhaustive()
    }
}

impl Service {
    /// A service over these ports.
    pub fn new(
        store: Arc<dyn Store>,
        topology: Arc<topology::Snapshot>,
        broker: Arc<dyn Broker>,
        answered: Arc<Answered>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            topology,
            broker,
            answered,
            reachability: Arc::default(),
            limits: settings.limits,
            max_undecided: settings.max_undecided,
            bodies: Gate::new(
                "bytes of prepare and publish",
                settings.inflight_bytes,
                BODY_CALL_BYTES,
            ),
            ending: Gate::new(
                "confirms, cancels, answers and reads",
                ENDING_BYTES,
                ENDING_CALL_BYTES,
            ),
            console: Gate::new("reads of the console", CONSOLE_CALLS, 1),
            undecided: Undecided::new(settings.max_undecided),
            backlog: Arc::new(Backlog::new(settings.max_backlog_bytes)),
            failures: Failures::default(),
        })
    }

    /// Which producers answered when they were last asked. The checker writes it, the
    /// console shows it.
    pub fn reachability(&self) -> Arc<Reachability> {
        Arc::clone(&self.reachability)
    }

    /// That a consumer may open a stream on this subscription of this topic.
    pub fn check_stream(
        &self,
        topic: &str,
        subscription: &str,
        consumer: &str,
    ) -> Result<(), Error> {
        limits::name("open.topic", topic)?;
        limits::name("open.subscription", subscription)?;
        if !consumer.is_empty() {
            limits::name("open.consumer", consumer)?;
        }
        let topology = self.topology.get();
        if !topology.topics.contains_key(topic) {
            return Err(Error::UnknownTopic(topic.to_owned()));
        }
        match topology.subscriptions.get(subscription) {
            Some(known) if known.topic == topic => Ok(()),
            Some(_) | None => Err(Error::UnknownSubscription(subscription.to_owned())),
        }
    }

    /// Runs work in a task of its own, which goes on when the caller is gone.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        match tokio::spawn(work).await {
            Ok(result) => result,
            Err(error) => Err(self.failures.of_task(&error)),
        }
    }

    fn failed(&self, error: store::Error) -> Error {
        self.failures.of_store(&error)
    }
}
