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
/// What a statement wrote becomes visible this long after the time that it wrote.
const SLACK: Duration = Duration::from_millis(500);
/// The same for this long after one of this process took longer than half of that. Whoever writes
/// tells its own process to claim, so those of others need no such care.
const SLOW_SLACK: Duration = Duration::from_secs(5);
const SLOW_FOR: Duration = Duration::from_secs(10);
/// The beginning of time.
pub(super) const ALWAYS: Timestamp = Timestamp::from_micros(i64::MIN);

/// The marks of all subscriptions.
#[derive(Default)]
pub(super) struct Marks(Mutex<State>);

#[derive(Default)]
struct State {
    marks: HashMap<String, Mark>,
    slow_until: Option<Instant>,
}

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
        let state = self.lock();
        let is_slow = state.slow_until.is_some_and(|until| asked < until);
        let slack = if is_slow { SLOW_SLACK } else { SLACK };
        let (floor, full) = match state.marks.get(subscription) {
            Some(mark) if mark.full_pass.elapsed() < FULL_PASS_EVERY => {
                (mark.floor.before(slack), false)
            }
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
        let mut state = self.lock();
        let known = state.marks.get(subscription);
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
            oldest.unwrap_or(now).min(now)
        };
        let mark = Mark {
            floor,
            seen: now,
            full_pass,
            written: Instant::now(),
        };
        state.marks.insert(subscription.to_owned(), mark);
    }

    /// A statement that made something due took so long.
    pub(super) fn wrote(&self, took: Duration) {
        if took > SLACK / 2 {
            self.lock().slow_until = Some(Instant::now() + SLOW_FOR);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves whole marks.
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
        assert_eq!(floor(&marks), oldest.before(SLACK));
        // What is due only later does not hide what is made due now.
        let later = NOW.after(Duration::from_secs(100));
        looked(&marks, NOW, Some(later));
        assert_eq!(floor(&marks), NOW.before(SLACK));
        assert_eq!(marks.from("b").floor, ALWAYS, "per subscription");
        for mark in marks.lock().marks.values_mut() {
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
        assert_eq!(floor(&marks), oldest.before(SLACK));
    }

    #[test]
    fn after_a_slow_write_more_is_looked_at_for_a_while() {
        let marks = Marks::default();
        looked(&marks, NOW, None);
        marks.wrote(SLACK / 2);
        assert_eq!(floor(&marks), NOW.before(SLACK));
        marks.wrote(SLACK);
        assert_eq!(floor(&marks), NOW.before(SLOW_SLACK));
        marks.lock().slow_until = Some(Instant::now());
        assert_eq!(floor(&marks), NOW.before(SLACK));
    }
}
