//! When things are done again: arithmetic over durations, and nothing else.

use std::time::Duration;

/// How far a step may be moved to either side, so that what failed together does not come
/// back together: ±10 %.
const JITTER: f64 = 0.1;

/// How often a delivery may fail before it is DEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempts {
    /// This many; at least 1.
    Limited(u32),
    /// Never DEAD by failing.
    Unlimited,
}

/// When one subscription's deliveries are tried again, and when they are given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryPolicy {
    /// The wait after the first, second, … attempt; the last step repeats. Never empty.
    pub schedule: Vec<Duration>,
    /// How often a delivery may fail.
    pub attempts: Attempts,
    /// Counted from confirm; older deliveries are DEAD.
    pub max_age: Option<Duration>,
}

impl Default for DeliveryPolicy {
    fn default() -> Self {
        const MINUTE: u64 = 60;
        const HOUR: u64 = 3600;
        let seconds = [
            45,
            MINUTE,
            5 * MINUTE,
            15 * MINUTE,
            HOUR,
            4 * HOUR,
            12 * HOUR,
            24 * HOUR,
        ];
        Self {
            schedule: seconds.map(Duration::from_secs).to_vec(),
            attempts: Attempts::Limited(10),
            max_age: None,
        }
    }
}

impl DeliveryPolicy {
    /// The wait behind the given number of attempts (1 is the first), moved by `chance`.
    pub fn step(&self, attempts: u32, chance: Chance) -> Duration {
        let index = (attempts.max(1) as usize - 1).min(self.schedule.len().saturating_sub(1));
        chance.spread(self.schedule.get(index).copied().unwrap_or_default())
    }

    /// True if this many attempts are all there are.
    pub fn used_up(&self, attempts: u32) -> bool {
        match self.attempts {
            Attempts::Limited(most) => attempts >= most,
            Attempts::Unlimited => false,
        }
    }
}

/// When a producer is asked what became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckPolicy {
    /// The wait between prepare and the first check.
    pub check_after: Duration,
}

impl CheckPolicy {
    /// Answered checks without a verdict after which a message is marked unresolved. It is a
    /// flag for people; checking goes on.
    pub const UNRESOLVED_AFTER_CHECKS: u32 = 20;

    /// Checks never come less often than this.
    pub const SLOWEST: Duration = Duration::from_secs(600);

    /// The wait until the next check, after `checks` answered ones: doubling from
    /// `check_after` up to [`Self::SLOWEST`].
    pub fn step(&self, checks: u32, chance: Chance) -> Duration {
        let doubled = self
            .check_after
            .saturating_mul(2u32.saturating_pow(checks.min(20)));
        chance.spread(doubled.min(Self::SLOWEST.max(self.check_after)))
    }
}

/// A number from -1 to 1 that the caller drew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance(f64);

impl Chance {
    /// No jitter at all.
    pub const NONE: Self = Self(0.0);

    /// From a number that is cut to -1 … 1.
    pub fn new(drawn: f64) -> Self {
        Self(drawn.clamp(-1.0, 1.0))
    }

    fn spread(self, step: Duration) -> Duration {
        step.mul_f64(1.0 + JITTER * self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_of_a_schedule_repeats() {
        let policy = DeliveryPolicy::default();
        assert_eq!(policy.step(1, Chance::NONE), Duration::from_secs(45));
        assert_eq!(policy.step(2, Chance::NONE), Duration::from_secs(60));
        assert_eq!(policy.step(8, Chance::NONE), Duration::from_secs(24 * 3600));
        assert_eq!(
            policy.step(u32::MAX, Chance::NONE),
            Duration::from_secs(24 * 3600)
        );
    }

    #[test]
    fn jitter_stays_within_a_tenth() {
        let policy = DeliveryPolicy::default();
        assert_eq!(
            policy.step(1, Chance::new(-9.0)),
            Duration::from_millis(40_500)
        );
        assert_eq!(
            policy.step(1, Chance::new(9.0)),
            Duration::from_millis(49_500)
        );
    }

    #[test]
    fn checks_decay_to_the_slowest_interval_and_stay_there() {
        let policy = CheckPolicy {
            check_after: Duration::from_secs(10),
        };
        assert_eq!(policy.step(0, Chance::NONE), Duration::from_secs(10));
        assert_eq!(policy.step(1, Chance::NONE), Duration::from_secs(20));
        assert_eq!(policy.step(6, Chance::NONE), CheckPolicy::SLOWEST);
        assert_eq!(policy.step(u32::MAX, Chance::NONE), CheckPolicy::SLOWEST);
    }

    #[test]
    fn unlimited_attempts_are_never_used_up() {
        let unlimited = DeliveryPolicy {
            attempts: Attempts::Unlimited,
            ..DeliveryPolicy::default()
        };
        assert!(!unlimited.used_up(u32::MAX));
        assert!(DeliveryPolicy::default().used_up(10));
        assert!(!DeliveryPolicy::default().used_up(9));
    }
}
