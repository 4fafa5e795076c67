//! How far each subscription has come: the mark "answered through".
//!
//! Overdue is not lost. A delivery counts as lost only when its subscription has passed it
//! by, that is, when something sent to the same queue well after it was answered. The answer
//! carries the time of its send back, so the mark costs no read. It lives in memory, and the
//! processes on one store tell each other once a second: not to know makes one only more patient.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::message::Timestamp;

/// The marks of all subscriptions.
#[derive(Debug, Default)]
pub struct Answered {
    marks: Mutex<HashMap<String, Mark>>,
}

#[derive(Debug, Default)]
struct Mark {
    /// The latest send that was answered.
    through: Option<Timestamp>,
    /// Arrivals so far.
    arrivals: u64,
    /// The numbers of the arrivals that are not durable yet.
    waiting: BTreeSet<u64>,
}

/// A moment in the arrivals of one subscription's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(u64);

/// Answers on their way to the store; while it lives, nothing of its subscription is resent.
#[derive(Debug)]
pub struct Waiting<'a> {
    answered: &'a Answered,
    subscription: String,
    number: u64,
}

impl Answered {
    /// Answers arrived and are about to be written.
    pub fn arrive(&self, subscription: &str) -> Waiting<'_> {
        let mut marks = self.lock();
        let mark = marks.entry(subscription.to_owned()).or_default();
        let number = mark.arrivals;
        mark.arrivals += 1;
        mark.waiting.insert(number);
        drop(marks);
        Waiting {
            answered: self,
            subscription: subscription.to_owned(),
            number,
        }
    }

    /// The latest send of this subscription that was answered; `None` before the first
    /// answer, and while answers wait to be written.
    pub fn through(&self, subscription: &str) -> Option<Timestamp> {
        let marks = self.lock();
        let mark = marks.get(subscription)?;
        mark.through.filter(|_| mark.waiting.is_empty())
    }

    /// The latest send of this subscription whose answer is durable, whatever waits.
    pub fn latest(&self, subscription: &str) -> Option<Timestamp> {
        self.lock().get(subscription)?.through
    }

    /// This moment, to be asked about later with [`Self::is_written`].
    pub fn moment(&self, subscription: &str) -> Moment {
        Moment(
            self.lock()
                .get(subscription)
                .map_or(0, |mark| mark.arrivals),
        )
    }

    /// True once no answer that arrived before this moment waits to be written. Under load
    /// some answer waits all the time, but each of them not for long.
    pub fn is_written(&self, subscription: &str, moment: Moment) -> bool {
        self.lock()
            .get(subscription)
            .and_then(|mark| mark.waiting.first().copied())
            .is_none_or(|oldest| oldest >= moment.0)
    }

    /// Every subscription of which answers came: how many arrivals, and the latest send whose
    /// answer is durable.
    pub fn all(&self) -> Vec<(String, u64, Option<Timestamp>)> {
        let marks = self.lock();
        let marks = marks.iter();
        marks
            .map(|(name, mark)| (name.clone(), mark.arrivals, mark.through))
            .collect()
    }

    /// Another process took an answer to a send at this time, and wrote it.
    pub fn heard(&self, subscription: &str, through: Timestamp, now: Timestamp) {
        let mut marks = self.lock();
        let mark = marks.entry(subscription.to_owned()).or_default();
        mark.through = mark.through.max(Some(through.min(now)));
    }

    /// True while answers of this subscription wait to be written.
    pub fn is_waiting(&self, subscription: &str) -> bool {
        self.lock()
            .get(subscription)
            .is_some_and(|mark| !mark.waiting.is_empty())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Mark>> {
        // A panic while the lock is held leaves plain numbers, which are never half-written.
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting<'_> {
    /// The answers are durable; `sent_at` is the latest send among them. A time after `now`
    /// is no evidence of anything and is cut.
    pub fn recorded(self, sent_at: Option<Timestamp>, now: Timestamp) {
        if let Some(mark) = self.answered.lock().get_mut(&self.subscription) {
            mark.through = mark.through.max(sent_at.map(|at| at.min(now)));
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(mark) = self.answered.lock().get_mut(&self.subscription) {
            mark.waiting.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: fn(i64) -> Timestamp = Timestamp::from_micros;

    #[test]
    fn the_mark_only_goes_forward() {
        let answered = Answered::default();
        assert_eq!(answered.through("accounting"), None);
        answered.arrive("accounting").recorded(Some(T(5)), T(10));
        answered.arrive("accounting").recorded(Some(T(3)), T(10));
        answered.arrive("accounting").recorded(None, T(10));
        assert_eq!(answered.through("accounting"), Some(T(5)));
        assert_eq!(answered.through("points"), None);
    }

    #[test]
    fn a_send_from_the_future_is_cut_to_now() {
        let answered = Answered::default();
        answered.arrive("accounting").recorded(Some(T(99)), T(10));
        assert_eq!(answered.through("accounting"), Some(T(10)));
    }

    #[test]
    fn nothing_is_passed_by_while_answers_wait() {
        let answered = Answered::default();
        answered.arrive("accounting").recorded(Some(T(5)), T(10));
        let waiting = answered.arrive("accounting");
        assert_eq!(answered.through("accounting"), None);
        assert!(answered.is_waiting("accounting"));
        drop(waiting);
        assert_eq!(answered.through("accounting"), Some(T(5)));
    }

    #[test]
    fn a_moment_is_written_although_later_answers_wait() {
        let answered = Answered::default();
        assert!(answered.is_written("accounting", answered.moment("accounting")));
        let early = answered.arrive("accounting");
        let moment = answered.moment("accounting");
        let late = answered.arrive("accounting");
        assert!(!answered.is_written("accounting", moment));
        early.recorded(Some(T(5)), T(10));
        assert!(answered.is_written("accounting", moment));
        assert_eq!(answered.through("accounting"), None);
        assert_eq!(answered.latest("accounting"), Some(T(5)));
        drop(late);
    }
}
