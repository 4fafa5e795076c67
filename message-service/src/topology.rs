//! Who produces, what about, and for whom: the part of the configuration that lives in the
//! store, so that no replica's memory decides who gets a message.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::message::{CheckPolicy, DeliveryPolicy};

/// A whole topology. It is checked and applied as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Goes up with every change; at least 1.
    pub version: u64,
    /// By name.
    pub producers: BTreeMap<String, Producer>,
    /// By name.
    pub topics: BTreeMap<String, Topic>,
    /// By name, which is unique in the deployment.
    pub subscriptions: BTreeMap<String, Subscription>,
}

/// A service that owns business transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Producer {
    /// Where Handfast asks what became of a message. Without it the producer may publish, not
    /// prepare.
    pub status_endpoint: Option<String>,
    /// When it is asked.
    pub checks: CheckPolicy,
}

/// A kind of fact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topic {
    /// Who may produce on it; empty: every producer.
    pub producers: BTreeSet<String>,
    /// Without it, a topic that nobody subscribes to refuses prepare and publish.
    pub may_have_no_subscriber: bool,
}

/// One consumer group on one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// What it subscribes to.
    pub topic: String,
    /// When its deliveries are tried again and given up.
    pub policy: DeliveryPolicy,
    /// How many messages may wait in its queue in RabbitMQ; without it, the larger of 10,000
    /// and what it answers in 5 s.
    pub max_in_queue: Option<u64>,
    /// The AMQP user whose answers count; without it, anybody's who may write to the queue of
    /// answers.
    pub amqp_user: Option<String>,
}

impl Topology {
    /// True if some subscription gets what is confirmed on this topic.
    pub fn has_subscriber(&self, topic: &str) -> bool {
        self.subscriptions
            .values()
            .any(|subscription| subscription.topic == topic)
    }

    /// Producers of an `older` topology whom nobody could ask any more: they are gone, or their
    /// status endpoint is.
    pub fn unasked_producers<'a>(&'a self, older: &'a Self) -> impl Iterator<Item = &'a str> {
        let asked = |name: &str| {
            let producer = self.producers.get(name);
            producer.is_some_and(|producer| producer.status_endpoint.is_some())
        };
        let gone = |name: &str| !self.producers.contains_key(name);
        older
            .producers
            .iter()
            .filter(move |(name, producer)| {
                gone(name) || (producer.status_endpoint.is_some() && !asked(name))
            })
            .map(|(name, _)| name.as_str())
    }

    /// The policy of a subscription.
    pub fn policy(&self, subscription: &str) -> Option<&DeliveryPolicy> {
        self.subscriptions
            .get(subscription)
            .map(|subscription| &subscription.policy)
    }
}

impl Default for Producer {
    fn default() -> Self {
        Self {
            status_endpoint: None,
            checks: CheckPolicy {
                check_after: Duration::from_secs(10),
            },
        }
    }
}

/// The topology as this process last read it from the store. It serves early refusals only;
/// who gets a message is decided by the store when the message is confirmed.
#[derive(Debug)]
pub struct Snapshot {
    current: std::sync::RwLock<std::sync::Arc<Topology>>,
}

impl Snapshot {
    /// Starts with this topology.
    pub fn new(topology: Topology) -> Self {
        Self {
            current: std::sync::RwLock::new(std::sync::Arc::new(topology)),
        }
    }

    /// The topology as last read.
    pub fn get(&self) -> std::sync::Arc<Topology> {
        // A panic while the lock is held leaves a whole topology, old or new.
        self.current
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Replaces it with what was read now.
    pub fn set(&self, topology: Topology) {
        *self
            .current
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = std::sync::Arc::new(topology);
    }
}
