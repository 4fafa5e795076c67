//! The port to producers: what became of it?
//!
//! A producer is asked only at the endpoint that was registered for it. Whatever it answers
//! wrongly is as good as no answer: only a clear verdict for an id that was asked counts.

pub mod grpc;

use async_trait::async_trait;
use uuid::Uuid;

use crate::message::{MessageId, Timestamp};

/// What a producer is asked about one prepared message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Which message.
    pub id: MessageId,
    /// What about.
    pub topic: String,
    /// The producer's identity of the fact.
    pub key: Option<String>,
    /// The fence identity that prepare carried; another fence cannot answer.
    pub fence: Option<Uuid>,
    /// When it was prepared; a fence that does not remember that long cannot answer.
    pub prepared_at: Timestamp,
}

/// What a producer says about one prepared message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictKind {
    /// The transaction committed, and that will not change.
    Committed,
    /// The transaction rolled back and can never commit.
    RolledBack,
    /// Not decided yet.
    InProgress,
    /// The producer cannot tell.
    Unknown,
}

/// The producer could not be asked, or gave no reply that can be read. Nothing is known about
/// any of the questions, and none of them counts as answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot ask {endpoint}: {reason}")]
pub struct Unreachable {
    /// The registered endpoint.
    pub endpoint: String,
    /// For people.
    pub reason: String,
}

/// Asks producers.
#[async_trait]
pub trait StatusSource: Send + Sync + 'static {
    /// Asks what became of these messages (at most [`handfast_proto::MAX_QUESTIONS`]). One
    /// entry per question, in order; `None` where the reply has no verdict that counts.
    async fn check(
        &self,
        endpoint: &str,
        questions: Vec<Question>,
    ) -> Result<Vec<Option<VerdictKind>>, Unreachable>;
}
