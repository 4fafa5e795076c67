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
    written: Instant,
}

/// From where on to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct From {
    pub(super) floor: Timestamp,
    /// That is everything.
    full: bool,
    asked: Instant,
}

impl Marks {
    /// From where on to look.
    pub(super) fn from(&self, subscription: &str) -> From {
        let asked = Instant::now();
        let (floor, full) = match self.lock().get(subscription) {
            Some(mark) if mark.full_pass.elapsed() < FULL_PASS_EVERY => (mark.floor, false),
            _ => (ALWAYS, true),
        };
        From { floor, full, asked }
    }

    /// From there on, at `now`, the oldest of what is PENDING was due then. Who looked at the same
    /// time and came first knows as much, and may have looked at more.
    pub(super) fn mark(
        &self,
        subscription: &str,
        from: From,
        now: Timestamp,
        oldest: Option<Timestamp>,
    ) {
        let mut marks = self.lock();
        let known = marks.get(subscription);
        if known.is_some_and(|mark| mark.written > from.asked) {
            return;
        }
        // A clock that went back makes new rows due before the mark.
        let went_back = known.is_some_and(|mark| now < mark.seen);
        let full_pass = match known {
            Some(mark) if !from.full && !went_back => mark.full_pass,
            _ => from.asked,
        };
        let floor = if went_back {
            ALWAYS
        } else {
            oldest.unwrap_or(now).min(now).before(STATEMENT_SLACK)
        };
        let mark = Mark {
            floor,
            seen: now,
            full_pass,
            written: Instant::now(),
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

    fn looked(marks: &Marks, now: Timestamp, oldest: Option<Timestamp>) {
        marks.mark("a", marks.from("a"), now, oldest);
    }

    fn floor(marks: &Marks) -> Timestamp {
        marks.from("a").floor
    }

    #[test]
    fn a_look_begins_where_the_last_found_nothing_older_until_the_next_full_pass() {
        let marks = Marks::default();
        assert_eq!(floor(&marks), ALWAYS);
        let oldest = NOW.before(Duration::from_secs(100));
        looked(&marks, NOW, Some(oldest));
        assert_eq!(floor(&marks), oldest.before(STATEMENT_SLACK));
        // What is due only later does not hide what is made due now.
        let later = NOW.after(Duration::from_secs(100));
        looked(&marks, NOW, Some(later));
        assert_eq!(floor(&marks), NOW.before(STATEMENT_SLACK));
        assert_eq!(marks.from("b").floor, ALWAYS, "per subscription");
        for mark in marks.lock().values_mut() {
            mark.full_pass -= FULL_PASS_EVERY;
        }
        assert_eq!(floor(&marks), ALWAYS);
    }

    #[test]
    fn after_a_clock_went_back_everything_is_looked_at() {
        let marks = Marks::default();
        looked(&marks, NOW, None);
        looked(&marks, NOW.before(Duration::from_secs(3_600)), None);
        assert_eq!(floor(&marks), ALWAYS);
    }

    #[test]
    fn who_began_before_the_last_mark_and_comes_after_it_changes_nothing() {
        let marks = Marks::default();
        looked(&marks, NOW, None);
        let slow = marks.from("a");
        let oldest = NOW.before(Duration::from_secs(100));
        looked(&marks, NOW.after(Duration::from_secs(5)), Some(oldest));
        marks.mark("a", slow, NOW, None);
        assert_eq!(floor(&marks), oldest.before(STATEMENT_SLACK));
    }
}
