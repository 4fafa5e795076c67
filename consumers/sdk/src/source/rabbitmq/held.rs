//! Which deliveries are here unanswered, and what RabbitMQ is told when answers are recorded.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use uuid::Uuid;

use crate::message::{Answered, Delivered};

/// What ties an answer to a delivery: the message and the generation of its copy.
pub(super) type Key = (Uuid, u32);

pub(super) fn key_of(message: &Delivered) -> Key {
    (message.message_id, message.generation)
}

pub(super) fn key(answered: &Answered) -> Key {
    (answered.message_id, answered.generation)
}

/// Delivery tags by what they deliver.
///
/// A tag dies with its channel. Its delivery is still worked on and answered, but there is
/// nothing left to ack: RabbitMQ has put the message back into its queue.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Oldest first, because the same copy can be here twice: once from before a connection
    /// was lost and once from after it.
    tags: HashMap<Key, VecDeque<Option<u64>>>,
    /// Tags of the open channel that are not answered.
    unanswered: BTreeSet<u64>,
    /// Answered tags behind one that is not; they wait to be acked together with it.
    answered: BTreeSet<u64>,
    /// So many may wait.
    may_wait: usize,
    /// Every tag of the open channel up to this one was seen.
    seen_through: u64,
    /// Tags behind a gap that were seen. Consumers of one channel are not read in the order of
    /// their tags.
    seen_ahead: BTreeSet<u64>,
    /// How many have lost their tag.
    lost: u32,
    /// How many are here, for who publishes their answers.
    here: Arc<AtomicUsize>,
}

/// What to ack.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Acks {
    /// This one and all before it.
    pub(super) through: Option<u64>,
    /// These alone, because something before them is not answered yet.
    pub(super) single: Vec<u64>,
}

impl Held {
    /// For a prefetch of so many deliveries. A quarter of it may wait to be acked together.
    pub(super) fn new(prefetch: u32, here: Arc<AtomicUsize>) -> Self {
        Self {
            may_wait: prefetch as usize / 4,
            here,
            ..Self::default()
        }
    }

    pub(super) fn take(&mut self, key: Key, tag: u64) {
        self.pass(tag);
        self.tags.entry(key).or_default().push_back(Some(tag));
        self.here.fetch_add(1, Ordering::Relaxed);
        self.unanswered.insert(tag);
    }

    /// A tag that needs no ack.
    ///
    /// RabbitMQ counts without a gap. What was not seen must not be acked together with what
    /// was: it may still come, or lapin has dropped it because it came after a cancel.
    pub(super) fn pass(&mut self, tag: u64) {
        self.seen_ahead.insert(tag);
        while self.seen_ahead.first() == Some(&(self.seen_through + 1)) {
            self.seen_ahead.pop_first();
            self.seen_through += 1;
        }
    }

    /// The channel is gone, and with it every tag.
    pub(super) fn lose_tags(&mut self) {
        for tag in self.tags.values_mut().flatten() {
            if tag.take().is_some() {
                self.lost += 1;
            }
        }
        self.unanswered.clear();
        self.answered.clear();
        self.seen_through = 0;
        self.seen_ahead.clear();
    }

    /// How many are here that lost their tag.
    pub(super) fn lost(&self) -> u32 {
        self.lost
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// Answers to these are recorded.
    ///
    /// Acks go out together, because RabbitMQ holds back what is acked one by one in quick
    /// succession, and forgets it when the channel closes.
    pub(super) fn settle(&mut self, keys: &[Key]) -> Acks {
        for key in keys {
            let Some(copies) = self.tags.get_mut(key) else {
                continue;
            };
            let copy = copies.pop_front();
            if copy.is_some() {
                self.here.fetch_sub(1, Ordering::Relaxed);
            }
            match copy {
                Some(Some(tag)) => {
                    self.unanswered.remove(&tag);
                    self.answered.insert(tag);
                }
                Some(None) => self.lost -= 1,
                None => {}
            }
            if copies.is_empty() {
                self.tags.remove(key);
            }
        }
        let unseen = self.seen_through + 1;
        let open = self
            .unanswered
            .first()
            .map_or(unseen, |tag| unseen.min(*tag));
        let waiting = self.answered.split_off(&open);
        let together = std::mem::replace(&mut self.answered, waiting);
        let mut single = Vec::new();
        if self.answered.len() > self.may_wait || self.tags.is_empty() {
            single.extend(std::mem::take(&mut self.answered));
        }
        Acks {
            through: together.last().copied(),
            single,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u128) -> Key {
        (Uuid::from_u128(id), 1)
    }

    /// Of a prefetch so small that nothing may wait.
    fn held(tags: &[u64]) -> Held {
        let mut held = Held::new(3, Arc::default());
        for tag in tags {
            held.take(key(u128::from(*tag)), *tag);
        }
        held
    }

    fn settle(held: &mut Held, ids: &[u128]) -> (Option<u64>, Vec<u64>) {
        let keys: Vec<Key> = ids.iter().copied().map(key).collect();
        let acks = held.settle(&keys);
        (acks.through, acks.single)
    }

    #[test]
    fn nothing_unanswered_is_acked_with_what_comes_behind_it() {
        let mut held = held(&[1, 2, 3, 4, 5]);
        assert_eq!(settle(&mut held, &[2, 4]), (None, vec![2, 4]));
        assert_eq!(settle(&mut held, &[1]), (Some(1), vec![]));
        assert_eq!(settle(&mut held, &[5, 3]), (Some(5), vec![]));
        assert!(held.is_empty());
    }

    #[test]
    fn acks_wait_for_what_comes_before_them_up_to_a_quarter_of_the_prefetch() {
        let here = Arc::new(AtomicUsize::new(0));
        let mut held = Held::new(8, Arc::clone(&here));
        for tag in 1..=8 {
            held.take(key(u128::from(tag)), tag);
        }
        assert_eq!(here.load(Ordering::Relaxed), 8);
        assert_eq!(settle(&mut held, &[2, 4]), (None, vec![]));
        assert_eq!(here.load(Ordering::Relaxed), 6);
        assert_eq!(settle(&mut held, &[1]), (Some(2), vec![]));
        assert_eq!(settle(&mut held, &[5, 6]), (None, vec![4, 5, 6]));
        assert_eq!(settle(&mut held, &[8]), (None, vec![]));
        assert_eq!(settle(&mut held, &[3, 7]), (Some(8), vec![]));
    }

    #[test]
    fn a_tag_is_not_used_after_its_channel() {
        let mut held = held(&[1, 2]);
        held.lose_tags();
        assert_eq!(held.lost(), 2);
        // The same copy comes again, on a new channel.
        held.take(key(2), 1);
        assert_eq!(settle(&mut held, &[1, 2]), (None, vec![]));
        assert_eq!(held.lost(), 0);
        assert_eq!(settle(&mut held, &[2]), (Some(1), vec![]));
        assert!(held.is_empty());
    }

    #[test]
    fn what_was_not_seen_is_not_acked_with_what_was() {
        let mut held = held(&[1, 2, 5]);
        held.pass(6);
        assert_eq!(settle(&mut held, &[1, 2, 5]), (Some(2), vec![5]));
        held.take(key(4), 4);
        held.take(key(7), 7);
        assert_eq!(settle(&mut held, &[4, 7]), (None, vec![4, 7]));
        held.take(key(3), 3);
        held.take(key(8), 8);
        assert_eq!(settle(&mut held, &[3, 8]), (Some(8), vec![]));
    }

    #[test]
    fn an_answer_to_nothing_that_is_here_acks_nothing() {
        let mut held = held(&[1]);
        assert_eq!(settle(&mut held, &[9]), (None, vec![]));
        assert!(!held.is_empty());
    }
}
