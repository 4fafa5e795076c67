//! What is counted while the run goes on: answers, and the dead.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use handfast_fail_points::Point;

use super::plan::Role;

/// One death.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fallen {
    /// Who.
    pub(crate) role: Role,
    /// The fail point, or None for SIGKILL.
    pub(crate) at: Option<Point>,
    /// How many orders were settled by then.
    pub(crate) settled: u64,
}

/// The counts of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Orders that were answered PAID.
    pub(crate) paid: AtomicU64,
    /// Orders that were answered REFUSED.
    pub(crate) refused: AtomicU64,
    /// Requests that wait for their answer.
    pub(crate) in_flight: AtomicU64,
    /// Calls that ended without an answer and were repeated.
    pub(crate) calls_repeated: AtomicU64,
    cuts: AtomicU64,
    fallen: Mutex<Vec<Fallen>>,
}

impl Tally {
    /// Notes a death.
    pub(crate) fn bury(&self, fallen: Fallen) {
        let mut list = self.fallen.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(fallen);
    }

    /// Notes that every connection to RabbitMQ was cut.
    pub(crate) fn cut(&self) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that happened.
    pub(crate) fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Relaxed)
    }

    /// The dead, in the order in which they died.
    pub(crate) fn fallen(&self) -> Vec<Fallen> {
        let list = self.fallen.lock().unwrap_or_else(PoisonError::into_inner);
        list.clone()
    }

    /// How often one process died.
    pub(crate) fn kills(&self, role: Role) -> u64 {
        let fallen = self.fallen();
        fallen.iter().filter(|fallen| fallen.role == role).count() as u64
    }

    /// Orders that have their final answer.
    pub(crate) fn settled(&self) -> u64 {
        self.paid.load(Ordering::Relaxed) + self.refused.load(Ordering::Relaxed)
    }
}
