//! What a message is, and the only code that decides what becomes of it.
//!
//! Nothing in here does I/O or reads a clock. Callers bring the facts and get back what
//! should be true next; [`crate::store`] makes it durable.

pub mod content;
pub mod delivery;
pub mod limits;
pub mod policy;
pub mod state;
pub mod time;

use std::fmt;

use uuid::Uuid;

pub use content::ContentHash;
pub use delivery::{Answer, AnswerKind, Delivery, DeliveryState};
pub use limits::{Invalid, Limits};
pub use policy::{Attempts, CheckPolicy, DeliveryPolicy};
pub use state::{Effect, MessageEvent, MessageState, WrongState};
pub use time::Timestamp;

/// The identity of a message, made by its producer, one per try of the business transaction.
/// Any UUID but the nil one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(Uuid);

impl MessageId {
    /// Reads 16 bytes; refuses another length and the nil id.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes)
            .ok()
            .filter(|id| !id.is_nil())
            .map(Self)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl From<Uuid> for MessageId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A message as its producer hands it over, checked against the [`Limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMessage {
    /// Made by the producer.
    pub id: MessageId,
    /// The registered name of the producer.
    pub producer: String,
    /// The kind of fact.
    pub topic: String,
    /// The producer's own identity of the fact.
    pub key: Option<String>,
    /// What the payload is.
    pub content_type: String,
    /// Name and value, in the producer's order.
    pub headers: Vec<(String, String)>,
    /// The fact itself; never looked into, never logged.
    pub payload: Vec<u8>,
    /// Not to be delivered before.
    pub deliver_after: Option<Timestamp>,
    /// The identity of the fence in the producer's database, if it has one.
    pub fence: Option<Uuid>,
}

impl NewMessage {
    /// What makes two messages the same fact.
    pub fn content_hash(&self) -> ContentHash {
        ContentHash::of(self)
    }

    /// Bytes of payload and headers: what the message costs in memory.
    pub fn body_bytes(&self) -> usize {
        self.payload.len()
            + self
                .headers
                .iter()
                .map(|(n, v)| n.len() + v.len())
                .sum::<usize>()
    }
}
