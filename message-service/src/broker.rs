//! The port to what carries deliveries to consumers.
//!
//! The store is the truth; a broker only carries. It claims due deliveries from the store,
//! hands them over, and marks them SENT. The passes and the service need only what is below.

pub mod embedded;
pub mod handoff;
pub mod rabbitmq;

use std::collections::BTreeSet;

use async_trait::async_trait;

use crate::message::{Answer, MessageId};
use crate::store::{Due, Handed, Heard, Overdue};
pub use handoff::Permit;

/// What the service and the recovery pass need of a broker.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Deliveries on these topics became due. A signal is only latency: a broker that misses
    /// it finds them by itself soon after.
    fn due(&self, topics: &BTreeSet<String>);

    /// What is due was looked at, about once a second. Only a signal, too.
    fn look_at(&self, due: &Due);

    /// What a confirm of so many messages may lease to this process, to be sent at once.
    fn permit(&self, messages: usize) -> Permit;

    /// Takes over what was leased with a permit.
    async fn hand_over(&self, permit: Permit, handed: Vec<Handed>);

    /// Answers for these messages are durable, so the broker need not hold them any longer.
    fn answered(&self, subscription: &str, ids: &[MessageId]);

    /// What all processes on the store have heard, about once a second.
    fn heard(&self, heard: &Heard);

    /// How many deliveries this process sends or has not marked SENT yet.
    fn holds(&self) -> u64;

    /// For each overdue delivery: true if its queue is known not to hold it, seen after its
    /// time ran out. False if that is not known.
    async fn is_gone(&self, subscription: &str, overdue: &[Overdue]) -> Vec<bool>;

    /// How many consumers are connected at this moment, where that is known.
    fn consumers(&self, subscription: &str) -> Option<u32>;

    /// Whether it can carry anything at this moment.
    fn state(&self) -> BrokerState;

    /// What is known of a subscription's queue, where there is one.
    fn queue(&self, subscription: &str) -> Option<QueueState>;

    /// How it is with the answers that come by way of it.
    fn answers(&self) -> AnswerState;
}

/// Whether a broker can carry anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BrokerState {
    /// It can.
    #[default]
    Up,
    /// It is there and takes nothing, for this reason.
    Blocked(String),
    /// It is not there, for this reason.
    Down(String),
}

/// What is known of a subscription's queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Consumers that are connected.
    pub consumers: u32,
    /// Messages that wait in it, without those that consumers hold.
    pub waiting: u64,
    /// Why nothing is sent to it; empty if something is.
    pub trouble: String,
}

/// Whether answers are taken, and how many were dropped since the start because nothing could
/// become of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerState {
    /// Why none are taken; empty while they are.
    pub trouble: String,
    /// They could not be read.
    pub unreadable: u64,
    /// Nobody declared their subscription.
    pub unknown: u64,
    /// Another user may answer for their subscription, and not theirs.
    pub foreign: u64,
}

/// Who makes answers durable that come by way of a broker.
#[async_trait]
pub trait AnswerSink: Send + Sync + 'static {
    /// Writes at most 500 answers. An error is worth a retry; what can never be written is no
    /// error.
    async fn acknowledge(&self, subscription: &str, answers: Vec<Answer>) -> Result<(), String>;
}
