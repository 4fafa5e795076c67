//! The port to the store: durable messages and deliveries.
//!
//! One method per promise, and every method is durable when it returns, so no caller can hold
//! a connection or forget to commit. Every method takes a list, because a commit costs the
//! same for one row as for five hundred; an implementation joins the lists of callers that
//! wait at the same time. Futures may be dropped at any moment: the work then goes on and is
//! done or not done as a whole.
//!
//! `conformance` is the one list of claims that every implementation has to pass.

mod kind;
mod policy;
pub mod postgres;
pub mod sqlite;
mod timeline;
mod views;

#[cfg(test)]
mod conformance;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::message::delivery::DeliveryEvent;
use crate::message::{
    Answer, ContentHash, DeliveryState, MessageEvent, MessageId, MessageState, NewMessage,
    Timestamp, WrongState,
};
use crate::topology::Topology;
pub use views::{
    Body, Counts, DeliveryCursor, DeliveryView, EventView, MessageFilter, MessageView, ReplicaView,
    Shown, SubscriptionCounts,
};

/// Why the store could not do what was asked. Nothing was half-done: an operation that
/// failed is not visible, except that a commit of unknown outcome may turn out to be durable,
/// which every caller heals by repeating.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot write or answer now: full, locked, read-only, gone. Worth a retry.
    #[error("cannot {doing}: the store is unavailable: {source}")]
    Unavailable {
        /// What was attempted.
        doing: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The store is stopping, or its queue is full. Worth a retry.
    #[error("cannot {doing}: the store {why}")]
    Busy {
        /// What was attempted.
        doing: &'static str,
        /// `is stopping` or `has too much to do`.
        why: &'static str,
    },
    /// A row does not say what this program expects. A retry will not help.
    #[error("cannot {doing}: {what}")]
    Inconsistent {
        /// What was attempted.
        doing: &'static str,
        /// Table, row and column.
        what: String,
    },
    /// The topology's version was used for another content.
    #[error(
        "topology_version {version} is in force with other content; \
         raise topology_version to apply the changed one"
    )]
    TopologyVersionReused {
        /// The version that both carry.
        version: u64,
    },
    /// The topology would strand messages.
    #[error(
        "producer `{producer}` has {prepared} PREPARED messages; keep it and its status_endpoint \
         in the topology until they are decided"
    )]
    ProducerHasPrepared {
        /// Who.
        producer: String,
        /// How many of its messages are undecided.
        prepared: u64,
    },
}

/// How an item of a list was refused. The other items are not touched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The caller has no message with this id.
    #[error("there is no message {0}")]
    NoSuchMessage(MessageId),
    /// The id belongs to another producer's message; nothing is said about it.
    #[error("the id {0} is in use")]
    IdTaken(MessageId),
    /// The id was used for other content.
    #[error("message {id} was handed over with other content and is {state}")]
    OtherContent {
        /// The id that was used twice.
        id: MessageId,
        /// What the stored message is.
        state: MessageState,
    },
    /// The key is held by a message that is not CANCELLED.
    #[error("the key is held by message {holder}, which is {state}")]
    KeyHeld {
        /// Who holds it.
        holder: MessageId,
        /// What the holder is.
        state: MessageState,
    },
    /// The message's state does not allow it.
    #[error("{wrong}: message {id}")]
    WrongState {
        /// Which message.
        id: MessageId,
        /// What was asked of which state.
        wrong: WrongState,
    },
}

/// What became of one item.
pub type ItemResult = Result<MessageState, Refusal>;

/// What a write of messages did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// One per item, in order.
    pub items: Vec<ItemResult>,
    /// Topics that now have deliveries that were not there before and that nobody has leased.
    pub topics: BTreeSet<String>,
    /// The deliveries that this write leased to its caller.
    pub handed: Vec<Handed>,
}

/// What a confirm may lease to its own process in the statement that creates the deliveries, so
/// that no claim stands between confirm and send. A store may lease less, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handoff {
    /// How long the leases last.
    pub lease: Duration,
    /// At most so many deliveries of each of these subscriptions.
    pub room: BTreeMap<String, usize>,
}

impl Handoff {
    /// Leases nothing: the deliveries are due at once for any process.
    pub fn none() -> Self {
        Self::default()
    }
}

/// A delivery that was leased as it was created; [`Store::load`] makes a claim of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handed {
    /// For whom.
    pub subscription: String,
    /// Which message.
    pub id: MessageId,
    /// The lease; settling repeats it.
    pub token: Uuid,
    /// Who produced it.
    pub producer: String,
    /// What about.
    pub topic: String,
    /// The producer's identity of the fact.
    pub key: Option<String>,
    /// The time of this send, which is the first: the confirm's.
    pub sent_at: Timestamp,
    /// Bytes of payload and headers.
    pub body_bytes: usize,
    /// Where the body is, for the store.
    pub bucket: i64,
    /// Whose body it is.
    pub content_hash: ContentHash,
}

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The producer's own confirm, cancel or publish.
    Producer,
    /// A verdict.
    Check,
    /// A person.
    Operator,
}

impl DecidedBy {
    /// The word that the store uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Producer => "PRODUCER",
            Self::Check => "CHECK",
            Self::Operator => "OPERATOR",
        }
    }

    /// Reads the word; `None` for one that a newer version may have written.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Producer, Self::Check, Self::Operator]
            .into_iter()
            .find(|by| by.as_str() == word)
    }
}

/// A confirm or a cancel of the producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Which message.
    pub id: MessageId,
    /// [`MessageEvent::Confirm`] or [`MessageEvent::Cancel`].
    pub event: MessageEvent,
}

/// What applying a topology did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is in force now.
    Changed,
    /// It was in force already.
    Unchanged,
    /// The store has a newer one, which stays.
    Older {
        /// The version in force.
        in_force: u64,
    },
}

/// A message that is leased to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckClaim {
    /// Which message.
    pub id: MessageId,
    /// The lease; settling repeats it.
    pub token: Uuid,
    /// What the producer is told about it.
    pub topic: String,
    /// The producer's identity of the fact.
    pub key: Option<String>,
    /// The fence identity that prepare carried.
    pub fence: Option<Uuid>,
    /// When it was prepared.
    pub prepared_at: Timestamp,
    /// Answered checks so far.
    pub checks: u32,
}

/// What became of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckResult {
    /// The transaction committed: confirm.
    Committed,
    /// The transaction rolled back: cancel.
    RolledBack,
    /// Answered, but no verdict: counts, and is asked again by the schedule.
    Undecided {
        /// IN_PROGRESS rather than UNKNOWN.
        in_progress: bool,
    },
    /// Not answered: does not count, and is due again after this long.
    Unanswered {
        /// From now.
        retry_after: Duration,
    },
}

/// A delivery that is leased to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryClaim {
    /// Which message.
    pub id: MessageId,
    /// The number of this send.
    pub generation: u32,
    /// The lease; settling repeats it.
    pub token: Uuid,
    /// Who produced it.
    pub producer: String,
    /// What about.
    pub topic: String,
    /// The producer's identity of the fact.
    pub key: Option<String>,
    /// What the payload is.
    pub content_type: String,
    /// Name and value, in the producer's order.
    pub headers: Vec<(String, String)>,
    /// The fact.
    pub payload: Vec<u8>,
    /// The time of this send: the claim's.
    pub sent_at: Timestamp,
    /// The time of the first send.
    pub first_sent_at: Timestamp,
}

/// What a claim of deliveries found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claimed {
    /// Oldest due first.
    pub deliveries: Vec<DeliveryClaim>,
    /// Something is due that has to be sent alone.
    pub alone_waits: bool,
    /// How long until the next delivery is due, if one is known; zero if more is due now. A store
    /// need not look further than [`LOOK_AHEAD`].
    pub next_due_in: Option<Duration>,
}

/// Which deliveries a claim takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// What never came back unanswered, this many at most, and at most this many bytes of
    /// bodies, but at least one.
    Normal {
        /// Rows.
        limit: usize,
        /// Bytes of payload and headers.
        max_bytes: usize,
    },
    /// As [`Lane::Normal`], but only what was confirmed within [`FRESH_FOR`].
    Fresh {
        /// Rows.
        limit: usize,
        /// Bytes of payload and headers.
        max_bytes: usize,
    },
    /// One delivery that came back unanswered, or that the broker closed a channel over.
    Alone,
}

/// How long after its confirm a delivery is fresh. What a backlog brings back must not hold up
/// what happens now, and an outage of a minute is a backlog, too.
pub const FRESH_FOR: Duration = Duration::from_secs(3);

/// What is due at one moment, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Subscriptions with deliveries to send.
    pub to_send: BTreeSet<String>,
    /// Subscriptions with deliveries that have to be sent alone.
    pub alone: BTreeSet<String>,
    /// Subscriptions with deliveries that were sent and whose answer is overdue.
    pub overdue: BTreeSet<String>,
    /// Producers with messages to be checked.
    pub checks: BTreeSet<String>,
    /// How long until something else is due, if that is less than [`LOOK_AHEAD`].
    pub next_in: Option<Duration>,
}

impl Due {
    /// Everything may be due.
    pub fn all(subscriptions: BTreeSet<String>, producers: BTreeSet<String>) -> Self {
        Self {
            to_send: subscriptions.clone(),
            alone: subscriptions.clone(),
            overdue: subscriptions,
            checks: producers,
            next_in: None,
        }
    }

    /// Takes note that the oldest of something of `name` is due at that time.
    fn note(
        &mut self,
        now: Timestamp,
        oldest: Option<Timestamp>,
        name: &str,
        of: impl Fn(&mut Self) -> &mut BTreeSet<String>,
    ) {
        match oldest {
            Some(due_at) if due_at <= now => {
                of(self).insert(name.to_owned());
            }
            Some(due_at) if due_at < now.after(LOOK_AHEAD) => {
                let wait = due_at.since(now);
                self.next_in = Some(self.next_in.map_or(wait, |next| next.min(wait)));
            }
            Some(_) | None => {}
        }
    }
}

/// How far a look sees.
pub const LOOK_AHEAD: Duration = Duration::from_secs(1);

/// A send that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Which message.
    pub id: MessageId,
    /// The lease.
    pub token: Uuid,
}

/// A leased delivery that the broker does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsent {
    /// Which message.
    pub id: MessageId,
    /// The lease.
    pub token: Uuid,
    /// Why not.
    pub why: NotSent,
}

/// Why a leased delivery was not sent. None of it is an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotSent {
    /// It was not tried: due at once, and nothing is noted.
    Untried,
    /// Its queue did not take it: returned, or rejected.
    Refused {
        /// What the broker said, for people.
        reason: String,
        /// When it is due again.
        retry_after: Duration,
    },
    /// The broker closed the channel with a protocol error while this was under way: suspect,
    /// so it is sent alone from now on, and DEAD after a few such closes.
    Suspect {
        /// What the broker said, for people.
        reason: String,
    },
}

impl NotSent {
    /// What it is for the delivery.
    fn event(&self) -> DeliveryEvent<'_> {
        match self {
            Self::Untried => DeliveryEvent::Untried,
            Self::Refused {
                reason,
                retry_after,
            } => DeliveryEvent::Refused {
                reason,
                retry_after: *retry_after,
            },
            Self::Suspect { reason } => DeliveryEvent::Suspected(reason),
        }
    }
}

/// A delivery whose stream ended before its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Which message.
    pub id: MessageId,
    /// The send that the stream held.
    pub generation: u32,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerOutcome {
    /// Written, or written before.
    Recorded,
    /// Of an earlier send or for a finished delivery: nothing changed.
    Stale,
    /// Final: the consumer drops it.
    NoSuchDelivery,
}

/// A delivery whose answer is overdue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Which message.
    pub id: MessageId,
    /// The last send.
    pub generation: u32,
    /// When that was.
    pub sent_at: Timestamp,
    /// Since when its silence may be looked at.
    pub due_at: Timestamp,
}

/// What the recovery pass decided about an overdue delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverdueDecision {
    /// Its subscription passed it by: an attempt.
    PassedBy,
    /// It may still be in the queue: look again after this long.
    Wait(Duration),
}

/// What one slice of retention did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retired {
    /// Messages that were removed with their deliveries and events.
    pub messages: u64,
    /// Bodies that were copied to the newest bucket, because their messages are unfinished.
    pub moved: u64,
    /// Body buckets that were dropped.
    pub buckets: u64,
    /// Whether another slice has something to do.
    pub more: bool,
}

/// What a process says of itself, about once a second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Which process; another one after every start.
    pub id: Uuid,
    /// Of the program.
    pub version: String,
    /// Where it serves.
    pub address: String,
    /// Deliveries that it sends or has not marked SENT yet.
    pub deliveries: u64,
    /// Messages that it asks about.
    pub checks: u64,
    /// The subscriptions of which it took answers since it last said so, each with the latest
    /// send that was answered, if answers say that.
    pub answered: Vec<(String, Option<Timestamp>)>,
}

/// What a process learns about all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Processes that said within [`ALIVE_FOR`] that they are there.
    pub alive: u32,
    /// The version of the topology in force.
    pub topology_version: u64,
    /// By subscription: the latest send that was answered, and how long ago answers last came.
    pub answered: Vec<(String, Option<Timestamp>, Duration)>,
}

/// Who has said nothing for so long may be gone.
pub const ALIVE_FOR: Duration = Duration::from_secs(5);
/// Who has said nothing for so long is forgotten.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(3_600);

/// A pass that one process runs for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// Brings back what got lost.
    Recovery,
    /// Removes what was finished long ago.
    Retention,
}

impl Shared {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Recovery, Self::Retention];

    /// What it is called, also in the database.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Recovery => "recovery",
            Self::Retention => "retention",
        }
    }
}

/// Who wants to run which pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakeTurn {
    /// Which.
    pub pass: Shared,
    /// Who.
    pub replica: Uuid,
    /// How long the turn is this process's.
    pub period: Duration,
    /// It has the turn and wants to keep it.
    pub again: bool,
}

/// The port. See the module's text for what all methods have in common.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The time by the clock that decides.
    fn now(&self) -> Timestamp;

    /// Puts a topology in force as a whole, unless it is older than the one that is. A
    /// subscription that is no longer in it is made inactive first, and then its open
    /// deliveries are SKIPPED with the reason.
    async fn apply_topology(&self, topology: Topology) -> Result<Applied, Error>;

    /// The topology in force: only what is active. Version 0 and empty before the first.
    async fn topology(&self) -> Result<Topology, Error>;

    /// The names of subscriptions that were removed and not added again.
    async fn removed_subscriptions(&self) -> Result<Vec<String>, Error>;

    /// Keeps messages, PREPARED. The first check is due `check_after` later. A repeat with the
    /// same content is OK while the message is PREPARED. A PREPARED holder of a contested key
    /// is due to be checked at once.
    async fn prepare(
        &self,
        messages: Vec<NewMessage>,
        check_after: Duration,
    ) -> Result<Written, Error>;

    /// Keeps messages, CONFIRMED, with their deliveries, in the same write.
    async fn publish(&self, messages: Vec<NewMessage>, handoff: Handoff) -> Result<Written, Error>;

    /// Confirms or cancels messages of this producer. Confirming creates one delivery per
    /// active subscription in the same statement. A contradiction marks CONFLICT.
    async fn decide(
        &self,
        producer: &str,
        decisions: Vec<Decision>,
        handoff: Handoff,
    ) -> Result<Written, Error>;

    /// The messages of this producer with these ids and their deliveries, in order; `None`
    /// where there is none.
    async fn get(
        &self,
        producer: &str,
        ids: Vec<MessageId>,
    ) -> Result<Vec<Option<(MessageView, Vec<DeliveryView>)>>, Error>;

    /// How many messages of this producer are PREPARED, counted up to `most`.
    async fn undecided(&self, producer: &str, most: u64) -> Result<u64, Error>;

    /// What is due of these subscriptions and producers. So cheap that it can be asked once a
    /// second by every process.
    async fn due(
        &self,
        subscriptions: BTreeSet<String>,
        producers: BTreeSet<String>,
    ) -> Result<Due, Error>;

    /// Leases messages of this producer whose check is due, oldest first. The lease saves
    /// work; it is not needed for correctness, because a decision is final whoever brings it.
    async fn claim_checks(
        &self,
        producer: &str,
        limit: usize,
        lease: Duration,
    ) -> Result<Vec<CheckClaim>, Error>;

    /// Writes what checks brought. A claim whose lease was lost changes nothing. Returns the
    /// topics that have new deliveries, and how many results were written.
    async fn settle_checks(
        &self,
        producer: &str,
        check_after: Duration,
        results: Vec<(CheckClaim, CheckResult)>,
    ) -> Result<(BTreeSet<String>, usize), Error>;

    /// Makes the next check of this message due now, unless one is in flight. False if the
    /// message is not PREPARED.
    async fn check_now(&self, id: MessageId) -> Result<bool, Error>;

    /// Leases due deliveries of this subscription, oldest first, and gives each its next
    /// generation.
    async fn claim_deliveries(
        &self,
        subscription: &str,
        lane: Lane,
        lease: Duration,
    ) -> Result<Claimed, Error>;

    /// Reads what is needed to send deliveries that a confirm has leased, in order; `None` where
    /// the body is gone, which is reported.
    async fn load(&self, handed: Vec<Handed>) -> Result<Vec<Option<DeliveryClaim>>, Error>;

    /// Marks leased deliveries SENT; their silence is looked at `resend_after` later. What was
    /// answered meanwhile, or whose lease was lost, stays as it is.
    async fn mark_sent(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        resend_after: Duration,
    ) -> Result<usize, Error>;

    /// Renews the leases of deliveries that are not SENT yet.
    async fn renew(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        lease: Duration,
    ) -> Result<usize, Error>;

    /// Gives back leased deliveries that the broker does not have. What was answered meanwhile,
    /// or whose lease was lost, stays as it is. Returns how many were given back.
    async fn return_unsent(&self, subscription: &str, unsent: Vec<Unsent>) -> Result<usize, Error>;

    /// Takes back what an ended stream held. `counts` is false if the service ended it.
    async fn return_deliveries(
        &self,
        subscription: &str,
        returned: Vec<Returned>,
        counts: bool,
    ) -> Result<usize, Error>;

    /// Writes consumers' answers, one outcome each, in order.
    async fn acknowledge(
        &self,
        subscription: &str,
        answers: Vec<Answer>,
    ) -> Result<Vec<AnswerOutcome>, Error>;

    /// Deliveries that are SENT and whose answer is overdue, oldest first.
    async fn overdue(&self, subscription: &str, limit: usize) -> Result<Vec<Overdue>, Error>;

    /// Writes what the recovery pass decided. What moved on meanwhile stays as it is.
    async fn settle_overdue(
        &self,
        subscription: &str,
        decisions: Vec<(Overdue, OverdueDecision)>,
    ) -> Result<usize, Error>;

    /// Makes deliveries DEAD that were confirmed longer ago than their subscription's
    /// `max_age`, at most `limit`. Returns how many.
    async fn expire(&self, subscription: &str, limit: usize) -> Result<usize, Error>;

    /// Sees to it that body buckets exist two ahead of now, each open for `span`.
    async fn open_buckets(&self, span: Duration) -> Result<(), Error>;

    /// Removes one slice (at most 500 rows) of what was finished before `cutoff`. The caller says
    /// when that was, because only who compares clocks knows which to believe.
    async fn retire(&self, cutoff: Timestamp) -> Result<Retired, Error>;

    /// About how many bytes what is unfinished takes: undecided messages, and for each topic those
    /// that its slowest subscription has open, with the bodies of a sample. What is finished does
    /// not count, however long it is kept.
    async fn backlog_bytes(&self) -> Result<u64, Error>;

    /// Says that a process is there and what it has heard, and returns what all have heard. Who
    /// has said nothing for [`REMEMBERED_FOR`] is forgotten. Nothing depends on it but what
    /// people see, and how soon a loss is noticed.
    async fn announce(&self, presence: Presence) -> Result<Heard, Error>;

    /// Says that a process ends.
    async fn leave(&self, id: Uuid) -> Result<(), Error>;

    /// The processes on this store, the longest serving first.
    async fn replicas(&self) -> Result<Vec<ReplicaView>, Error>;

    /// Takes the turn at a pass, if it is due, and then it is due again a period later; or says
    /// after how long to ask again. Who has the turn may keep it. A turn further away than two
    /// periods counts as due: the clock has jumped.
    async fn take_turn(&self, turn: TakeTurn) -> Result<Option<Duration>, Error>;

    /// How many of what.
    async fn counts(&self) -> Result<Counts, Error>;

    /// Everything about one message.
    async fn show(&self, id: MessageId, with_body: bool) -> Result<Option<Shown>, Error>;

    /// A page of messages by id, after the cursor.
    async fn list_messages(
        &self,
        filter: MessageFilter,
        after: Option<MessageId>,
        limit: usize,
    ) -> Result<Vec<MessageView>, Error>;

    /// A page of deliveries by subscription and id, after the cursor.
    async fn list_deliveries(
        &self,
        state: DeliveryState,
        subscription: Option<&str>,
        after: Option<DeliveryCursor>,
        limit: usize,
    ) -> Result<Vec<DeliveryView>, Error>;

    /// Finishes what is queued and closes the database. Later calls are refused.
    async fn close(&self);
}
