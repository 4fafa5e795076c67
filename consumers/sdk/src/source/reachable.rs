//! Says in the log that the other end went away and that it came back, once each.

use std::fmt::Display;

/// One thing that may be impossible for a while. `K` tells one trouble from another: the same
/// trouble is logged once, however often it is met.
pub(super) struct Reachable<K> {
    what: &'static str,
    trouble: Option<K>,
}

impl<K: PartialEq + std::fmt::Debug> Reachable<K> {
    /// `what` completes the sentence "cannot …".
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            trouble: None,
        }
    }

    pub(super) fn no(&mut self, address: &str, code: K, reason: impl Display) {
        if self.trouble.as_ref() != Some(&code) {
            tracing::warn!(
                address,
                ?code,
                %reason,
                "cannot {}; trying again",
                self.what
            );
            self.trouble = Some(code);
        }
    }

    pub(super) fn yes(&mut self, address: &str) {
        if self.trouble.take().is_some() {
            tracing::info!(address, "can {} again", self.what);
        }
    }
}
