//! The two clocks: the one on the wall, and the one that only goes forward.
//!
//! The clock that decides is the store's. This one is its source for the embedded store, and
//! what passes use to pace themselves.

use std::sync::Mutex;
use std::time::Duration;

use crate::message::Timestamp;

/// Tells the time.
pub trait Clock: Send + Sync + 'static {
    /// The host's wall clock. It may jump.
    fn wall(&self) -> Timestamp;
    /// Time since some fixed moment of this process. It never goes back.
    fn monotonic(&self) -> Duration;
}

/// The host's clocks.
#[derive(Debug)]
pub struct SystemClock {
    started: std::time::Instant,
}

impl SystemClock {
    /// Counts monotonic time from now.
    pub fn new() -> Self {
        Self {
            started: std::time::Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the host's clock"
    )]
    fn wall(&self) -> Timestamp {
        Timestamp::from_micros(chrono::Utc::now().timestamp_micros())
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }
}

/// A clock that a test moves by hand.
#[derive(Debug)]
pub struct ManualClock {
    state: Mutex<(Timestamp, Duration)>,
}

impl ManualClock {
    /// Starts at this wall time.
    pub fn at(wall: Timestamp) -> Self {
        Self {
            state: Mutex::new((wall, Duration::ZERO)),
        }
    }

    /// Time passes, on both clocks.
    pub fn advance(&self, span: Duration) {
        let mut state = self.lock();
        *state = (state.0.after(span), state.1 + span);
    }

    /// Somebody sets the wall clock.
    pub fn set_wall(&self, wall: Timestamp) {
        self.lock().0 = wall;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Timestamp, Duration)> {
        // A panic while the lock is held leaves two plain numbers, which are never half-written.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Timestamp {
        self.lock().0
    }

    fn monotonic(&self) -> Duration {
        self.lock().1
    }
}
