//! What a failed store call becomes: logged here once with its cause, then reduced to what
//! the caller may know.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::{Error, store};

/// One line per kind in this time; a store that is down fails every call.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// The failures of one service.
#[derive(Debug, Default)]
pub(super) struct Failures {
    unavailable: Throttle,
    inconsistent: Throttle,
    panicked: Throttle,
}

#[derive(Debug, Default)]
struct Throttle {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Throttle {
    /// How many lines were left out since the last one; `None` if this one is left out too.
    fn pass(&self) -> Option<u64> {
        // A panic while the lock is held leaves plain values, which are never half-written.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, left_out) = *state;
        if last.is_some_and(|at| at.elapsed() < LOG_EVERY) {
            state.1 = left_out.saturating_add(1);
            return None;
        }
        *state = (Some(Instant::now()), 0);
        Some(left_out)
    }
}

impl Failures {
    /// The store could not do it.
    pub(super) fn of_store(&self, error: &store::Error) -> Error {
        match error {
            store::Error::Unavailable { .. } | store::Error::Busy { .. } => {
                if let Some(left_out) = self.unavailable.pass() {
                    tracing::warn!(left_out, "a call was refused, it may be repeated: {error}");
                }
                Error::Unavailable
            }
            // The last two are answers to the command that applies a topology, which is no call.
            store::Error::Inconsistent { .. }
            | store::Error::TopologyVersionReused { .. }
            | store::Error::ProducerHasPrepared { .. } => {
                if let Some(left_out) = self.inconsistent.pass() {
                    tracing::error!(left_out, "a call failed for good: {error}");
                }
                Error::Internal
            }
        }
    }

    /// The task of a call ended without a result.
    pub(super) fn of_task(&self, error: &tokio::task::JoinError) -> Error {
        if let Some(left_out) = self.panicked.pass() {
            tracing::error!(left_out, "a call ended without a result: {error}");
        }
        Error::Internal
    }

    /// A broken promise between two parts of this program.
    pub(super) fn of_program(&self, what: &str) -> Error {
        if let Some(left_out) = self.inconsistent.pass() {
            tracing::error!(left_out, "a call failed for good: {what}");
        }
        Error::Internal
    }
}
