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
/// What a statement wrote becomes visible this long after the time that it wrote, as a rule.
const SLACK: Duration = Duration::from_millis(500);
/// The same for looks, which are few, and which find what another process wrote slowly and does not
/// send itself; and for claims after a write of this process was slow.
const SLOW_SLACK: Duration = Duration::from_secs(5);
/// Claims look so far back for this long then.
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
    /// From where on to claim.
    pub(super) fn claim_from(&self, subscription: &str) -> From {
        let slow_until = self.lock().slow_until;
        match slow_until.is_some_and(|until| Instant::now() < until) {
            true => self.look_from(subscription),
            false => self.before(subscription, SLACK),
        }
    }

    /// From where on to look.
    pub(super) fn look_from(&self, subscription: &str) -> From {
        self.before(subscription, SLOW_SLACK)
    }

    fn before(&self, subscription: &str, slack: Duration) -> From {
        let asked = Instant::now();
        let state = self.lock();
        let (floor, full) = match state.marks.get(subscription) {
            Some(mark) if mark.full_pass.elapsed() < FULL_PASS_EVERY => {
                (mark.floor.before(slack), false)
            }
            _ => (ALWAYS, true),
        };
        From { floor, full, asked }
    }

    /// From there on, at `now`, the oldest of what is PENDING was due then. Who looked at the same
    /// time and came first knows as much, but not of what is older.
    pub(super) fn mark(
        &self,
        subscription: &str,
        from: From,
        now: Timestamp,
        oldest: Option<Timestamp>,
    ) {
        let mut state = self.lock();
        if let Some(known) = state.marks.get_mut(subscription)
            && known.written > from.asked
        {
            known.floor = oldest.map_or(known.floor, |oldest| oldest.min(known.floor));
            return;
        }
        let known = state.marks.get(subscription);
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

    /// A statement that makes something due took so long; None if it failed, and so may still
    /// become durable.
    pub(super) fn wrote(&self, took: Option<Duration>) {
        if took.is_none_or(|took| took > SLACK / 2) {
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
        marks.mark("a", marks.claim_from("a"), now, oldest);
    }

    fn floor(marks: &Marks) -> Timestamp {
        marks.claim_from("a").floor
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
        assert_eq!(marks.claim_from("b").floor, ALWAYS, "per subscription");
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
        let slow = marks.claim_from("a");
        let oldest = NOW.before(Duration::from_secs(100));
        looked(&marks, NOW.after(Duration::from_secs(5)), Some(oldest));
        marks.mark("a", slow, NOW, None);
        assert_eq!(floor(&marks), oldest.before(SLACK));
    }

    #[test]
    fn after_a_slow_write_more_is_looked_at_for_a_while() {
        let marks = Marks::default();
        looked(&marks, NOW, None);
        marks.wrote(Some(SLACK / 2));
        assert_eq!(floor(&marks), NOW.before(SLACK));
        for slow in [Some(SLACK), None] {
            marks.wrote(slow);
            assert_eq!(floor(&marks), NOW.before(SLOW_SLACK));
            marks.lock().slow_until = Some(Instant::now());
            assert_eq!(floor(&marks), NOW.before(SLACK));
        }
    }

    #[test]
    fn a_look_goes_further_back_and_what_it_finds_is_claimed() {
        let marks = Marks::default();
        looked(&marks, NOW, None);
        let look = marks.look_from("a");
        assert_eq!(look.floor, NOW.before(SLOW_SLACK));
        // A claim comes in between.
        looked(&marks, NOW, None);
        let written_late = NOW.before(3 * SLACK);
        marks.mark("a", look, NOW, Some(written_late));
        assert_eq!(floor(&marks), written_late.before(SLACK));
    }
}
