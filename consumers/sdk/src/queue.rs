//! What was delivered and waits for its turn, and what may run together.

use std::collections::{HashSet, VecDeque};

use crate::message::Delivered;

/// Bounded by the prefetch, because credit is.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    together: VecDeque<Delivered>,
    alone: VecDeque<Delivered>,
}

impl Queue {
    pub(crate) fn push(&mut self, message: Delivered) {
        match message.alone {
            true => self.alone.push_back(message),
            false => self.together.push_back(message),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.together.is_empty() && self.alone.is_empty()
    }

    /// Takes what may run in one transaction now: what is there, at most `max`, in order of
    /// arrival. `idle` says that nothing else is running.
    ///
    /// A delivery that is to run alone waits until nothing else runs and nothing else is here:
    /// if it ends the process, it takes nothing with it. Its source asks for nothing more
    /// meanwhile, so this ends. A second copy of a message waits for the next batch, where the
    /// inbox knows it.
    pub(crate) fn take(&mut self, max: usize, idle: bool) -> Option<Vec<Delivered>> {
        if self.together.is_empty() {
            let alone = idle.then(|| self.alone.pop_front())?;
            return alone.map(|message| vec![message]);
        }
        let mut ids = HashSet::new();
        let together = self
            .together
            .iter()
            .take(max)
            .take_while(|message| ids.insert(message.message_id))
            .count();
        Some(self.together.drain(..together).collect())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn message(id: u128, alone: bool) -> Delivered {
        Delivered {
            message_id: Uuid::from_u128(id),
            subscription: "accounting".to_owned(),
            topic: "payment.completed".to_owned(),
            producer: "payment".to_owned(),
            key: None,
            content_type: String::new(),
            headers: Vec::new(),
            payload: tokio_util::bytes::Bytes::new(),
            generation: 1,
            sent_at: 0,
            first_sent_at: 0,
            alone,
        }
    }

    fn queue(messages: &[(u128, bool)]) -> Queue {
        let mut queue = Queue::default();
        for &(id, alone) in messages {
            queue.push(message(id, alone));
        }
        queue
    }

    fn ids(batch: Option<Vec<Delivered>>) -> Option<Vec<u128>> {
        batch.map(|batch| batch.iter().map(|m| m.message_id.as_u128()).collect())
    }

    #[test]
    fn a_batch_takes_what_is_there_up_to_its_size() {
        let mut queue = queue(&[(1, false), (2, false), (3, false)]);
        assert_eq!(ids(queue.take(2, true)), Some(vec![1, 2]));
        assert_eq!(ids(queue.take(2, true)), Some(vec![3]));
        assert_eq!(ids(queue.take(2, true)), None);
    }

    #[test]
    fn what_is_to_run_alone_waits_until_nothing_else_is_here() {
        let mut queue = queue(&[(1, false), (2, true), (3, false), (4, true)]);
        assert_eq!(ids(queue.take(9, true)), Some(vec![1, 3]));
        assert_eq!(ids(queue.take(9, false)), None);
        assert_eq!(ids(queue.take(9, true)), Some(vec![2]));
        assert_eq!(ids(queue.take(9, true)), Some(vec![4]));
        assert!(queue.is_empty());
    }

    #[test]
    fn a_second_copy_waits_for_the_next_batch() {
        let mut queue = queue(&[(1, false), (2, false), (1, false)]);
        assert_eq!(ids(queue.take(9, true)), Some(vec![1, 2]));
        assert_eq!(ids(queue.take(9, true)), Some(vec![1]));
    }
}
