//! How long to wait before the next try.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);

/// Doubles from 100 ms to 5 s unless told otherwise. Jitter takes off up to half, so that many
/// consumers do not come back at the same moment.
#[derive(Debug)]
pub(crate) struct Backoff {
    step: Duration,
    last: Duration,
    chance: StdRng,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self::up_to(LAST)
    }

    /// Doubles from 100 ms to `last`.
    pub(crate) fn up_to(last: Duration) -> Self {
        Self {
            step: FIRST,
            last,
            chance: StdRng::from_os_rng(),
        }
    }

    pub(crate) fn reset(&mut self) {
        self.step = FIRST;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.step.mul_f64(self.chance.random_range(0.5..=1.0));
        self.step = (self.step * 2).min(self.last);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_to_five_seconds_and_starts_again() {
        let mut backoff = Backoff::new();
        let waits: Vec<Duration> = (0..12).map(|_| backoff.next()).collect();
        assert!(waits[0] <= FIRST && waits[0] >= FIRST / 2);
        assert!(waits.iter().all(|wait| *wait <= LAST));
        assert!(waits[11] >= LAST / 2);
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
