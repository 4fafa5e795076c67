//! What people see of the store. Nothing here is decided by.

use uuid::Uuid;

use super::DecidedBy;
use crate::message::{DeliveryState, MessageId, MessageState, Timestamp};

/// A message as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageView {
    /// Which message.
    pub id: MessageId,
    /// Whose.
    pub producer: String,
    /// What about.
    pub topic: String,
    /// The producer's identity of the fact.
    pub key: Option<String>,
    /// Where it is in its life.
    pub state: MessageState,
    /// Who decided it.
    pub decided_by: Option<DecidedBy>,
    /// When it was prepared or published.
    pub prepared_at: Timestamp,
    /// When it was decided.
    pub decided_at: Option<Timestamp>,
    /// Answered checks.
    pub checks: u32,
    /// When it is checked next.
    pub check_at: Option<Timestamp>,
    /// Many checks and no verdict.
    pub unresolved: bool,
    /// A decision was contradicted.
    pub conflict: bool,
    /// Confirmed without an active subscription.
    pub unsubscribed: bool,
}

/// A delivery as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryView {
    /// Which message.
    pub id: MessageId,
    /// For whom.
    pub subscription: String,
    /// Where it is in its life.
    pub state: DeliveryState,
    /// Counted attempts.
    pub attempts: u32,
    /// The last send.
    pub generation: u32,
    /// When it is sent or looked at next.
    pub due_at: Option<Timestamp>,
    /// The first send.
    pub first_sent_at: Option<Timestamp>,
    /// The last send.
    pub sent_at: Option<Timestamp>,
    /// The answer that ended it.
    pub answered_at: Option<Timestamp>,
    /// The last reason.
    pub last_error: Option<String>,
}

/// A line of a timeline that columns do not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventView {
    /// When.
    pub at: Timestamp,
    /// One word of the API's list.
    pub kind: String,
    /// For whom, if it concerns one delivery.
    pub subscription: Option<String>,
    /// For people.
    pub detail: String,
}

/// Headers and payload of a message.
pub type Body = (Vec<(String, String)>, Vec<u8>);

/// Everything about one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The message.
    pub message: MessageView,
    /// Its deliveries by subscription.
    pub deliveries: Vec<DeliveryView>,
    /// Its rare events by time.
    pub events: Vec<EventView>,
    /// If it was asked for.
    pub body: Option<Body>,
}

/// A process on this store, as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaView {
    /// Which process.
    pub id: Uuid,
    /// Of the program.
    pub version: String,
    /// Where it serves.
    pub address: String,
    /// When it said something first.
    pub started_at: Timestamp,
    /// When it said something last.
    pub seen_at: Timestamp,
    /// Deliveries that it held then.
    pub deliveries: u64,
    /// Messages that it asked about then.
    pub checks: u64,
}

/// How many of what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// PREPARED messages.
    pub prepared: u64,
    /// CONFIRMED messages.
    pub confirmed: u64,
    /// CANCELLED messages.
    pub cancelled: u64,
    /// Messages with many checks and no verdict.
    pub unresolved: u64,
    /// Messages whose decision was contradicted.
    pub conflict: u64,
    /// Messages confirmed without an active subscription.
    pub unsubscribed: u64,
    /// Rows in a state that this version does not know.
    pub unknown: u64,
    /// By name.
    pub subscriptions: Vec<SubscriptionCounts>,
    /// PREPARED messages by producer.
    pub producers: Vec<(String, u64)>,
}

/// How many deliveries of one subscription are open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubscriptionCounts {
    /// Which.
    pub name: String,
    /// On which topic.
    pub topic: String,
    /// Whether it gets what is confirmed now.
    pub active: bool,
    /// Waiting.
    pub pending: u64,
    /// Sent, unanswered.
    pub sent: u64,
    /// For a person.
    pub dead: u64,
    /// When the oldest PENDING or SENT one was confirmed.
    pub oldest_open_at: Option<Timestamp>,
}

/// Which messages a list shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageFilter {
    /// In this state.
    State(MessageState),
    /// With this mark, whatever the state.
    Unresolved,
    /// With this mark, whatever the state.
    Conflict,
    /// With this mark, whatever the state.
    Unsubscribed,
}

/// Where a page of deliveries begins: after this one.
pub type DeliveryCursor = (String, MessageId);
