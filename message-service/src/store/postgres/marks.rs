//! Below which time nothing of a subscription was due when last looked: claims and looks begin
//! there, so that they do not walk over what was done long ago and cannot be vacuumed yet.
//!
//! A speed-up only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::message::Timestamp;

/// How often everything is looked at.
const FULL_PASS_EVERY: Duration = Duration::from_secs(30);
/// A statement may become visible this long after the time that it wrote.
const STATEMENT_SLACK: Duration = Duration::from_secs(5);
/// Who looked at the same time may come here in another order; this is no clock that went back,
/// and what it would make due before a mark is above its floor.
const OUT_OF_ORDER: Duration = Duration::from_secs(1);
/// The beginning of time.
pub(super) const ALWAYS: Timestamp = Timestamp::from_micros(i64::MIN);

/// The marks of all subscriptions.
#[derive(Default)]
pub(super) struct Marks(Mutex<HashMap<String, Mark>>);

#[derive(Clone, Copy)]
struct Mark {
    floor: Timestamp,
    seen: Timestamp,
    full_pass: Instant,
}

impl Marks {
    /// From where on to look. True if that is everything.
    pub(super) fn floor(&self, subscription: &str) -> (Timestamp, bool) {
        match self.lock().get(subscription) {
            Some(mark) if mark.full_pass.elapsed() < FULL_PASS_EVERY => (mark.floor, false),
            _ => (ALWAYS, true),
        }
    }

    /// At `now`, the oldest of what is PENDING was due then.
    pub(super) fn mark(
        &self,
        subscription: &str,
        now: Timestamp,
        oldest: Option<Timestamp>,
        full: bool,
    ) {
        let mut marks = self.lock();
        let known = marks.get(subscription);
        // A clock that went back makes new rows due before the mark.
        let went_back = known.is_some_and(|mark| now.after(OUT_OF_ORDER) < mark.seen);
        let full_pass = match known {
            Some(mark) if !full && !went_back => mark.full_pass,
            _ => Instant::now(),
        };
        let floor = if went_back {
            ALWAYS
        } else {
            let oldest = oldest.unwrap_or(now).min(now);
            oldest.before(STATEMENT_SLACK + OUT_OF_ORDER)
        };
        let mark = Mark {
            floor,
            seen: now,
            full_pass,
        };
        marks.insert(subscription.to_owned(), mark);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Mark>> {
        // A panic while the lock is held leaves a whole map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_micros(1_000_000_000);
    const SLACK: Duration = Duration::from_secs(6);

    #[test]
    fn a_look_begins_where_the_last_found_nothing_older_until_the_next_full_pass() {
        let marks = Marks::default();
        assert_eq!(marks.floor("a"), (ALWAYS, true));
        let oldest = NOW.before(Duration::from_secs(100));
        marks.mark("a", NOW, Some(oldest), true);
        assert_eq!(marks.floor("a"), (oldest.before(SLACK), false));
        // What is due only later does not hide what is made due now.
        let later = NOW.after(Duration::from_secs(100));
        marks.mark("a", NOW, Some(later), false);
        assert_eq!(marks.floor("a"), (NOW.before(SLACK), false));
        assert_eq!(marks.floor("b"), (ALWAYS, true), "per subscription");
        for mark in marks.lock().values_mut() {
            mark.full_pass -= FULL_PASS_EVERY;
        }
        assert_eq!(marks.floor("a"), (ALWAYS, true));
    }

    #[test]
    fn after_a_clock_went_back_everything_is_looked_at() {
        let marks = Marks::default();
        marks.mark("a", NOW, None, true);
        marks.mark("a", NOW.before(Duration::from_secs(3_600)), None, false);
        assert_eq!(marks.floor("a").0, ALWAYS);
    }

    #[test]
    fn looks_at_the_same_time_are_no_clock_that_went_back() {
        let marks = Marks::default();
        marks.mark("a", NOW, None, true);
        let just_before = NOW.before(Duration::from_millis(20));
        marks.mark("a", just_before, None, false);
        assert_eq!(marks.floor("a").0, just_before.before(SLACK));
    }
}
