//! What RabbitMQ or the way to it said, and what that means for a message.

use std::time::Duration;

use lapin::ErrorKind;
use lapin::protocol::AMQPError;

/// Why something with RabbitMQ did not work.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// No answer in time.
    #[error("cannot {doing}: no answer within {} s", .within.as_secs())]
    TimedOut {
        /// What was attempted.
        doing: &'static str,
        /// How long that may take.
        within: Duration,
    },
    /// Nothing can be written.
    #[error("answers are left in RabbitMQ: {0}")]
    StoreAway(String),
    /// It was refused, or the connection broke.
    #[error("{}", text(.0))]
    Lapin(#[from] lapin::Error),
}

impl Error {
    pub(super) fn timed_out(doing: &'static str, within: Duration) -> Self {
        Self::TimedOut { doing, within }
    }
}

/// What an error says, in one line.
pub(super) fn text(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(refused) => {
            format!("{} ({})", refused.get_message(), refused.get_id())
        }
        _ => error.to_string(),
    }
}

/// What the server said when it closed a channel or a connection.
pub(super) fn refusal(error: &lapin::Error) -> Option<&AMQPError> {
    match error.kind() {
        ErrorKind::ProtocolError(refused) => Some(refused),
        _ => None,
    }
}

/// True if a close with this code may be some message's fault: a frame, header or property that
/// the server cannot take. All other codes speak of rights, resources or operators, and then
/// every message would meet the same.
pub(super) fn is_about_a_message(code: u16) -> bool {
    const CONTENT_TOO_LARGE: u16 = 311;
    const PRECONDITION_FAILED: u16 = 406;
    const FRAME_ERROR: u16 = 501;
    const SYNTAX_ERROR: u16 = 502;
    const COMMAND_INVALID: u16 = 503;
    const CHANNEL_ERROR: u16 = 504;
    const UNEXPECTED_FRAME: u16 = 505;
    matches!(
        code,
        CONTENT_TOO_LARGE
            | PRECONDITION_FAILED
            | FRAME_ERROR
            | SYNTAX_ERROR
            | COMMAND_INVALID
            | CHANNEL_ERROR
            | UNEXPECTED_FRAME
    )
}

/// The code of «no such queue».
pub(super) const NOT_FOUND: u16 = 404;
/// The code of «you may not».
pub(super) const ACCESS_REFUSED: u16 = 403;
/// The code of «declared before with other arguments».
pub(super) const INEQUIVALENT: u16 = 406;
