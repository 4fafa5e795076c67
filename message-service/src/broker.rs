//! The port to what carries deliveries to consumers.
//!
//! The store is the truth; a broker only carries. It claims due deliveries from the store,
//! hands them over, and marks them SENT. The passes and the service need only what is below.

pub mod embedded;

use std::collections::BTreeSet;

use async_trait::async_trait;

use crate::message::MessageId;
use crate::store::Overdue;

/// What the service and the recovery pass need of a broker.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Deliveries on these topics became due. A signal is only latency: a broker that misses
    /// it finds them by itself soon after.
    fn due(&self, topics: &BTreeSet<String>);

    /// Answers for these messages are durable, so the broker need not hold them any longer.
    fn answered(&self, subscription: &str, ids: &[MessageId]);

    /// For each overdue delivery: true if its queue is known not to hold it, seen after its
    /// time ran out. False if that is not known.
    async fn is_gone(&self, subscription: &str, overdue: &[Overdue]) -> Vec<bool>;

    /// How many consumers are connected at this moment, where that is known.
    fn consumers(&self, subscription: &str) -> Option<u32>;
}
