//! Bounds on what is in flight, so that pressure becomes a refusal with a hint rather than
//! memory.
//!
//! There is one gate per priority: bodies (prepare, publish) are refused first, while the
//! verbs that end something pass a gate of their own that bodies cannot fill.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Error;

/// The right to be in flight; it is given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    _bytes: OwnedSemaphorePermit,
}

/// A bound on the bytes of one kind of call.
#[derive(Debug)]
pub(super) struct Gate {
    what: &'static str,
    bytes: Arc<Semaphore>,
    capacity_bytes: u32,
    least_bytes: u32,
}

impl Gate {
    /// Lets `capacity_bytes` through at a time. A call costs at least `least_bytes`, which
    /// bounds the number of small calls too.
    pub(super) fn new(what: &'static str, capacity_bytes: usize, least_bytes: usize) -> Self {
        let most = u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX);
        let capacity = u32::try_from(capacity_bytes).unwrap_or(most).clamp(1, most);
        Self {
            what,
            bytes: Arc::new(Semaphore::new(capacity as usize)),
            capacity_bytes: capacity,
            least_bytes: u32::try_from(least_bytes).unwrap_or(capacity).max(1),
        }
    }

    /// Lets a call through or refuses it, without waiting: a queue in front of a full store
    /// would only add its own memory and latency.
    pub(super) fn admit(&self, bytes: usize) -> Result<Permit, Error> {
        // What is larger than the whole gate passes alone, or it could never pass.
        let cost = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .max(self.least_bytes)
            .min(self.capacity_bytes);
        match Arc::clone(&self.bytes).try_acquire_many_owned(cost) {
            Ok(permit) => Ok(Permit { _bytes: permit }),
            Err(_) => Err(Error::Overloaded { what: self.what }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_until_a_permit_comes_back() {
        let gate = Gate::new("bodies", 100, 1);
        let first = gate.admit(60).unwrap();
        assert_eq!(
            gate.admit(60).unwrap_err(),
            Error::Overloaded { what: "bodies" }
        );
        let _small = gate.admit(40).unwrap();
        drop(first);
        gate.admit(60).unwrap();
    }

    #[test]
    fn a_call_larger_than_the_gate_passes_alone() {
        let gate = Gate::new("bodies", 100, 1);
        let alone = gate.admit(1_000_000).unwrap();
        gate.admit(1).unwrap_err();
        drop(alone);
        gate.admit(1).unwrap();
    }

    #[test]
    fn small_calls_are_bounded_by_number() {
        let gate = Gate::new("calls", 100, 50);
        let _held = [gate.admit(0).unwrap(), gate.admit(1).unwrap()];
        gate.admit(0).unwrap_err();
    }
}
