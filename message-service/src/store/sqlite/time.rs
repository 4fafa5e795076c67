//! Time on SQLite: the larger of the last time written and start time plus what passed since.
//!
//! With SQLite the database's clock is the host's, which may be set back. Counting from the
//! start by the monotonic clock, and never starting behind what was written, keeps leases and
//! schedules from standing still or running early.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use crate::clock::Clock;
use crate::message::Timestamp;

pub(super) struct StoreClock {
    clock: Arc<dyn Clock>,
    base: Timestamp,
    started: Duration,
    latest: AtomicI64,
}

impl StoreClock {
    pub(super) fn start(clock: Arc<dyn Clock>, last_written: Timestamp) -> Self {
        let base = clock.wall().max(last_written);
        let started = clock.monotonic();
        Self {
            clock,
            base,
            started,
            latest: AtomicI64::new(base.as_micros()),
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        let passed = self.clock.monotonic().saturating_sub(self.started);
        let now = self.base.after(passed).as_micros();
        Timestamp::from_micros(self.latest.fetch_max(now, Ordering::Relaxed).max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn a_wall_clock_that_was_set_back_changes_nothing() {
        let wall = Arc::new(ManualClock::at(Timestamp::from_micros(1_000_000)));
        let clock = StoreClock::start(wall.clone(), Timestamp::default());
        wall.advance(Duration::from_secs(1));
        wall.set_wall(Timestamp::default());
        assert_eq!(clock.now(), Timestamp::from_micros(2_000_000));
    }

    #[test]
    fn time_starts_behind_nothing_that_was_written() {
        let wall = Arc::new(ManualClock::at(Timestamp::from_micros(5)));
        let clock = StoreClock::start(wall, Timestamp::from_micros(70));
        assert_eq!(clock.now(), Timestamp::from_micros(70));
    }
}
