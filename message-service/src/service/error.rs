//! How a call, or one item of its list, is refused.

use std::time::Duration;

use super::store;
use crate::message::{Invalid, MessageId};

/// Why a call or an item was refused. The text is for people; what a program can act on is in
/// the variant, and [`crate::api`] turns both into one `google.rpc.Status`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Malformed, or over a limit.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Nobody registered a producer with this name.
    #[error("there is no producer `{0}`")]
    UnknownProducer(String),
    /// Nobody declared a topic with this name.
    #[error("there is no topic `{0}`")]
    UnknownTopic(String),
    /// Nobody declared a subscription with this name.
    #[error("there is no subscription `{0}`")]
    UnknownSubscription(String),
    /// The caller has no message with this id; it may be another's.
    #[error("there is no message {0}")]
    UnknownMessage(MessageId),
    /// The topic has a list of producers and this one is not on it.
    #[error("producer `{producer}` may not produce on topic `{topic}`")]
    TopicNotAllowed {
        /// Who tried.
        producer: String,
        /// Where.
        topic: String,
    },
    /// Who answers for the subscription has to prove it, and only AMQP can.
    #[error("subscription `{subscription}` has an amqp_user, so its answers count only over AMQP")]
    AnswersByAmqpOnly {
        /// Which subscription.
        subscription: String,
    },
    /// Nobody would ever receive it, and the topic does not say that this is fine.
    #[error("topic `{topic}` has no active subscription")]
    NoSubscriber {
        /// Which topic.
        topic: String,
    },
    /// Nobody could be asked what became of a prepared message.
    #[error("producer `{producer}` has no status endpoint and may publish, not prepare")]
    NoStatusEndpoint {
        /// Which producer.
        producer: String,
    },
    /// The producer leaves too much undecided.
    #[error("producer `{producer}` has {limit} undecided messages, which is the limit")]
    TooManyUndecided {
        /// Which producer.
        producer: String,
        /// The limit, in messages.
        limit: u64,
    },
    /// As much is unfinished as may be.
    #[error(
        "about {backlog_bytes} bytes of messages are unfinished, the limit is {limit_bytes} bytes"
    )]
    BacklogFull {
        /// What is unfinished.
        backlog_bytes: u64,
        /// What may be.
        limit_bytes: u64,
    },
    /// Too much of this kind is in flight.
    #[error("too many {what} are in flight")]
    Overloaded {
        /// Of what.
        what: &'static str,
    },
    /// The store refused the item.
    #[error(transparent)]
    Refused(#[from] store::Refusal),
    /// The store cannot write or answer now. The cause was logged.
    #[error("the store is unavailable, try again")]
    Unavailable,
    /// A fault of the service. The cause was logged.
    #[error("the service met a fault of its own")]
    Internal,
}

impl Error {
    /// After what time a repeat may succeed, if waiting alone can help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { .. } => Some(Duration::from_millis(200)),
            Self::Unavailable | Self::TooManyUndecided { .. } => Some(Duration::from_secs(1)),
            Self::BacklogFull { .. } => Some(Duration::from_secs(5)),
            Self::Invalid(_)
            | Self::UnknownProducer(_)
            | Self::UnknownTopic(_)
            | Self::UnknownSubscription(_)
            | Self::UnknownMessage(_)
            | Self::TopicNotAllowed { .. }
            | Self::AnswersByAmqpOnly { .. }
            | Self::NoSubscriber { .. }
            | Self::NoStatusEndpoint { .. }
            | Self::Refused(_)
            | Self::Internal => None,
        }
    }
}
