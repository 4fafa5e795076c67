//! What a handler gets and what it says.

use std::fmt;
use std::time::Duration;

use tokio_util::bytes::Bytes;
use uuid::Uuid;

/// One message on its way to one subscription.
///
/// It may come more than once; the inbox makes the effect happen once.
#[derive(Clone, PartialEq, Eq)]
pub struct Delivered {
    /// The message's identity.
    pub message_id: Uuid,
    /// Whom it is for.
    pub subscription: String,
    /// What kind of fact it is.
    pub topic: String,
    /// Who says so: the registered name of the producer.
    pub producer: String,
    /// The producer's own identity of the fact.
    pub key: Option<String>,
    /// How to read the payload, as the producer says.
    pub content_type: String,
    /// The producer's headers, as name and value.
    pub headers: Vec<(String, String)>,
    /// The fact itself.
    pub payload: Bytes,
    /// Which send this is; it goes back with the answer.
    pub generation: u32,
    /// When this copy was sent, in microseconds since 1970 UTC by the service's database.
    pub sent_at: i64,
    /// When the first copy was sent, likewise.
    pub first_sent_at: i64,
    /// It came back unanswered before and may be what ended a process: it runs alone.
    pub alone: bool,
}

impl Delivered {
    /// The first header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

impl fmt::Debug for Delivered {
    /// Leaves out headers and payload, which must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivered")
            .field("message_id", &self.message_id)
            .field("subscription", &self.subscription)
            .field("topic", &self.topic)
            .field("producer", &self.producer)
            .field("generation", &self.generation)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// The handler's word on a message.
///
/// Only [`Consumed`](Self::Consumed) commits the transaction; with every other answer the
/// handler's work and the inbox row are rolled back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The effect is in the transaction: commit it.
    Consumed,
    /// It did not work. It is tried again by the subscription's schedule, and counts as an
    /// attempt. Reasons are cut at 1,000 bytes.
    Failed(String),
    /// Not yet: try again after this time, at most 7 days. It does not count as an attempt.
    Later(Duration),
    /// It will never work: give it to a person at once.
    Rejected(String),
}

impl Answer {
    /// [`Failed`](Self::Failed) with an error's text.
    pub fn failed(reason: impl fmt::Display) -> Self {
        Self::Failed(reason.to_string())
    }

    /// [`Rejected`](Self::Rejected) with an error's text.
    pub fn rejected(reason: impl fmt::Display) -> Self {
        Self::Rejected(reason.to_string())
    }
}

/// An answer with what ties it to the send it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answered {
    pub(crate) message_id: Uuid,
    pub(crate) generation: u32,
    pub(crate) sent_at: i64,
    pub(crate) answer: Answer,
}

impl Answered {
    pub(crate) fn new(message: &Delivered, answer: Answer) -> Self {
        Self {
            message_id: message.message_id,
            generation: message.generation,
            sent_at: message.sent_at,
            answer,
        }
    }
}
