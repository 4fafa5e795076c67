//! What can go wrong, and what the caller may conclude from it.

use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, RpcStatusExt as _, StatusExt as _};
use uuid::Uuid;

use crate::fence::FenceError;

/// Why a [`Producer`](crate::Producer) cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one.
    #[error("cannot connect to Handfast at `{url}`: {source}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// More addresses than anybody needs.
    #[error("cannot connect to Handfast at {given} addresses: there may be at most 16")]
    TooMany {
        /// How many were given.
        given: usize,
    },
    /// The name is empty or longer than 100 bytes.
    #[error("cannot connect to Handfast as `{name}`: a producer's name has 1 to 100 bytes")]
    Name {
        /// As given.
        name: String,
    },
}

/// What the service said instead of OK, or what the connection did.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The code of the item, or of the whole call.
    pub code: Code,
    /// For people.
    pub message: String,
    /// For programs: `ErrorInfo`, `BadRequest`, `ResourceInfo`, `RetryInfo`.
    pub details: ErrorDetails,
}

impl Refusal {
    /// The reason of the `ErrorInfo` of domain `handfast`, such as `NO_SUBSCRIBER`.
    pub fn reason(&self) -> Option<&str> {
        self.details
            .error_info()
            .filter(|info| info.domain == "handfast")
            .map(|info| info.reason.as_str())
    }

    /// The id of the message that the refusal speaks of.
    pub fn other_message(&self) -> Option<Uuid> {
        self.metadata("message_id")
            .and_then(|id| Uuid::parse_str(id).ok())
    }

    /// The state that the refusal speaks of: `PREPARED`, `CONFIRMED` or `CANCELLED`.
    pub fn state(&self) -> Option<&str> {
        // The name may come as in the contract's enum.
        self.metadata("state")
            .map(|state| state.strip_prefix("MESSAGE_STATE_").unwrap_or(state))
    }

    fn metadata(&self, name: &str) -> Option<&str> {
        let info = self.details.error_info()?;
        info.metadata.get(name).map(String::as_str)
    }

    /// True if the same call may succeed later. False for what is wrong with the call itself.
    pub(crate) fn may_pass(&self) -> bool {
        // No `_` arm: every code was thought about.
        match self.code {
            Code::Ok
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss => false,
            // A broken connection is reported as any of these.
            Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable => true,
        }
    }

    /// How long the service asks to wait, at most 5 s of it.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        let hint = self.details.retry_info()?.retry_delay?;
        Some(hint.min(Duration::from_secs(5)))
    }

    pub(crate) fn from_item(status: &tonic_types::Status) -> Self {
        Self {
            code: Code::from_i32(status.code),
            message: status.message.clone(),
            details: status.get_error_details(),
        }
    }

    pub(crate) fn from_call(status: &Status) -> Self {
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            details: status.get_error_details(),
        }
    }

    pub(crate) fn of_reply(message: &str) -> Self {
        Self {
            code: Code::Internal,
            message: message.to_owned(),
            details: ErrorDetails::new(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.code)?;
        if let Some(reason) = self.reason() {
            write!(f, " {reason}")?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if let Some(bad) = self.details.bad_request() {
            for violation in &bad.field_violations {
                write!(f, " (`{}` {})", violation.field, violation.description)?;
            }
        }
        Ok(())
    }
}

/// Why one of the low-level verbs did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The service refused; the same call would be refused again.
    #[error("cannot {verb} message {message_id}: {refusal}")]
    Refused {
        /// `prepare`, `confirm`, `cancel`, `publish` or `get`.
        verb: &'static str,
        /// The message of the call.
        message_id: Uuid,
        /// What the service said.
        refusal: Box<Refusal>,
    },
    /// No answer within the deadline. Whether the call had an effect is not known.
    #[error("cannot {verb} message {message_id} in {waited_ms} ms: {last}")]
    Unavailable {
        /// `prepare`, `confirm`, `cancel`, `publish` or `get`.
        verb: &'static str,
        /// The message of the call.
        message_id: Uuid,
        /// How long it was tried.
        waited_ms: u64,
        /// What the last try ended with.
        last: Box<Refusal>,
    },
}

impl CallError {
    /// What was said, by the service or by the connection.
    pub fn refusal(&self) -> &Refusal {
        match self {
            Self::Refused { refusal, .. } => refusal,
            Self::Unavailable { last, .. } => last,
        }
    }
}

/// Why [`transact`](crate::Producer::transact) did not commit, or does not know.
///
/// Only [`OutcomeUnknown`](Self::OutcomeUnknown) leaves the business in doubt. After every
/// other error it has no effect, now or later.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactError<E> {
    /// The closure's own error; the transaction was rolled back.
    #[error("the business transaction failed: {0}")]
    Business(E),
    /// The message was refused; the closure did not run.
    #[error("cannot prepare message {message_id}: {refusal}")]
    Refused {
        /// Of this try.
        message_id: Uuid,
        /// What the service said.
        refusal: Box<Refusal>,
    },
    /// Handfast could not be reached within the deadline; the closure did not run.
    #[error("cannot prepare message {message_id} in {waited_ms} ms: {last}")]
    Unavailable {
        /// Of this try.
        message_id: Uuid,
        /// How long it was tried.
        waited_ms: u64,
        /// What the last try ended with.
        last: Box<Refusal>,
    },
    /// Another message holds the key and was not decided within the deadline; the closure did
    /// not run. The fact may become true by that other try.
    #[error("the key is held by message {holder}, which is not decided yet")]
    HolderUndecided {
        /// The message that holds the key.
        holder: Uuid,
    },
    /// The database has no fence that can be relied on; the closure did not run.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The transaction could not be begun, or was not within the deadline; the closure did
    /// not run.
    #[error("cannot begin the business transaction of message {message_id}: {source}")]
    Begin {
        /// Of this try.
        message_id: Uuid,
        /// What the database said.
        source: sqlx::Error,
    },
    /// Three tries were fenced by a status check before their transaction began; the closure
    /// did not run. The database or the pool is far too slow for the check schedule.
    #[error("message {message_id} was fenced before its business ran, as were 2 before it")]
    Fenced {
        /// Of the last try.
        message_id: Uuid,
    },
    /// The commit failed, and the fence proves that nothing was committed.
    #[error("cannot commit the business transaction of message {message_id}: {source}")]
    Commit {
        /// Of this try.
        message_id: Uuid,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The commit failed and the fence could not be asked. Handfast's check will settle the
    /// message; ask the business's own tables what became of it.
    #[error("it is not known whether the business of message {message_id} committed: {reason}")]
    OutcomeUnknown {
        /// Of this try.
        message_id: Uuid,
        /// What stood in the way.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_refusal_tells_the_holder_of_a_key() {
        let id = Uuid::now_v7();
        let refusal = Refusal {
            code: Code::AlreadyExists,
            message: "key is held".into(),
            details: ErrorDetails::with_error_info(
                "KEY_HELD",
                "handfast",
                HashMap::from([
                    ("message_id".to_owned(), id.to_string()),
                    ("state".to_owned(), "MESSAGE_STATE_PREPARED".to_owned()),
                ]),
            ),
        };
        assert_eq!(refusal.reason(), Some("KEY_HELD"));
        assert_eq!(refusal.other_message(), Some(id));
        assert_eq!(refusal.state(), Some("PREPARED"));
        assert!(!refusal.may_pass());
        assert_eq!(refusal.to_string(), "AlreadyExists KEY_HELD: key is held");
    }
}
