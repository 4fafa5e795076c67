//! How many undecided messages a producer may leave behind.
//!
//! Counting them for every prepare would cost a read each. Instead an upper bound is kept:
//! what the store counted last, plus what was accepted since and what is in flight. It may be
//! too high, because decisions are not subtracted; then the store is counted again before
//! anything is refused. It is never too low, however many calls run at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::store;

/// A count older than this is taken again, because other replicas prepare too.
const STALE_AFTER: Duration = Duration::from_secs(1);

/// The bounds of all producers.
#[derive(Debug)]
pub(super) struct Undecided {
    limit: u64,
    producers: Mutex<HashMap<String, Arc<Producer>>>,
}

#[derive(Debug, Default)]
struct Producer {
    bound: Mutex<Bound>,
    /// Held while the store is counted, so that callers at the limit share one count.
    counting: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Bound {
    counted: u64,
    counted_at: Option<Instant>,
    accepted_since: u64,
    in_flight: u64,
}

impl Bound {
    fn total(&self) -> u64 {
        self.counted
            .saturating_add(self.accepted_since)
            .saturating_add(self.in_flight)
    }
}

/// Room for prepares in flight. Dropped without a word it counts as used, because a write of
/// unknown outcome may be durable.
#[derive(Debug)]
pub(super) struct Reservation {
    producer: Arc<Producer>,
    reserved: u64,
    accepted: u64,
}

impl Reservation {
    /// How many items have room.
    pub(super) fn granted(&self) -> usize {
        usize::try_from(self.reserved).unwrap_or(usize::MAX)
    }

    /// So many of them were kept.
    pub(super) fn settle(mut self, accepted: usize) {
        self.accepted = (accepted as u64).min(self.reserved);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut bound = self.producer.bound();
        bound.in_flight = bound.in_flight.saturating_sub(self.reserved);
        bound.accepted_since = bound.accepted_since.saturating_add(self.accepted);
    }
}

impl Producer {
    fn bound(&self) -> MutexGuard<'_, Bound> {
        // A panic while the lock is held leaves plain numbers, which are never half-written.
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Undecided {
    /// Each producer may leave `limit` messages undecided.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            producers: Mutex::default(),
        }
    }

    /// Room for up to `wanted` more messages of a registered producer; for as many as fit.
    /// `count` asks the store how many there are, counted up to the number it is given.
    pub(super) async fn reserve<C, F>(
        &self,
        producer: &str,
        wanted: usize,
        count: C,
    ) -> Result<Reservation, store::Error>
    where
        C: FnOnce(u64) -> F,
        F: Future<Output = Result<u64, store::Error>>,
    {
        let arrived = Instant::now();
        let wanted = wanted as u64;
        let producer = self.producer(producer);
        if let Some(room) = self.take(&producer, wanted, arrived) {
            return Ok(room);
        }
        let _counting = producer.counting.lock().await;
        // Somebody may have counted while this call waited for its turn.
        let newer = producer.bound().counted_at.is_some_and(|at| at >= arrived);
        if !newer {
            self.recount(&producer, count).await?;
        }
        Ok(self.take_what_fits(&producer, wanted))
    }

    /// The whole room at once, if the last count is recent and has it.
    fn take(&self, producer: &Arc<Producer>, wanted: u64, now: Instant) -> Option<Reservation> {
        let fits = {
            let bound = producer.bound();
            let recent = bound
                .counted_at
                .is_some_and(|at| now.saturating_duration_since(at) < STALE_AFTER);
            recent && bound.total().saturating_add(wanted) <= self.limit
        };
        fits.then(|| self.take_what_fits(producer, wanted))
            .filter(|room| room.reserved == wanted)
    }

    fn take_what_fits(&self, producer: &Arc<Producer>, wanted: u64) -> Reservation {
        let mut bound = producer.bound();
        let reserved = wanted.min(self.limit.saturating_sub(bound.total()));
        bound.in_flight += reserved;
        drop(bound);
        Reservation {
            producer: Arc::clone(producer),
            reserved,
            accepted: reserved,
        }
    }

    async fn recount<C, F>(&self, producer: &Producer, count: C) -> Result<(), store::Error>
    where
        C: FnOnce(u64) -> F,
        F: Future<Output = Result<u64, store::Error>>,
    {
        let started = Instant::now();
        // What is settled before the count begins is in it; what is settled later may not be.
        let settled_before = producer.bound().accepted_since;
        let counted = count(self.limit).await?;
        let mut bound = producer.bound();
        bound.counted = counted;
        bound.counted_at = Some(started);
        bound.accepted_since -= settled_before.min(bound.accepted_since);
        Ok(())
    }

    /// Only registered producers come here, so the map cannot grow without bound.
    fn producer(&self, name: &str) -> Arc<Producer> {
        let mut producers = self
            .producers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match producers.get(name) {
            Some(producer) => Arc::clone(producer),
            None => Arc::clone(producers.entry(name.to_owned()).or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn granted(undecided: &Undecided, wanted: usize, stored: u64) -> Reservation {
        undecided
            .reserve("payment", wanted, |_| async move { Ok(stored) })
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn calls_in_flight_count_against_the_limit() {
        let undecided = Undecided::new(10);
        let first = granted(&undecided, 6, 0).await;
        assert_eq!(first.granted(), 6);
        let second = granted(&undecided, 6, 0).await;
        assert_eq!(second.granted(), 4, "only what fits beside the first");
        assert_eq!(granted(&undecided, 1, 0).await.granted(), 0);
    }

    #[tokio::test]
    async fn what_was_accepted_counts_until_the_store_counts_it() {
        let undecided = Undecided::new(10);
        granted(&undecided, 6, 0).await.settle(6);
        assert_eq!(granted(&undecided, 6, 6).await.granted(), 4);
    }

    #[tokio::test]
    async fn what_was_refused_makes_room_at_once() {
        let undecided = Undecided::new(10);
        granted(&undecided, 10, 0).await.settle(0);
        assert_eq!(granted(&undecided, 10, 0).await.granted(), 10);
    }

    #[tokio::test]
    async fn a_decided_message_makes_room_for_the_next_call() {
        let undecided = Undecided::new(10);
        granted(&undecided, 10, 0).await.settle(10);
        assert_eq!(granted(&undecided, 1, 10).await.granted(), 0);
        assert_eq!(granted(&undecided, 1, 9).await.granted(), 1);
    }

    #[tokio::test]
    async fn a_write_of_unknown_outcome_counts_as_kept() {
        let undecided = Undecided::new(10);
        drop(granted(&undecided, 8, 0).await);
        // The store is asked, because the bound says there is no room; it counts the eight.
        assert_eq!(granted(&undecided, 3, 8).await.granted(), 2);
    }

    #[tokio::test]
    async fn the_store_is_not_counted_again_while_there_is_room() {
        let undecided = Undecided::new(10);
        granted(&undecided, 2, 0).await.settle(2);
        let room = undecided
            .reserve("payment", 2, |_| async { panic!("counted again") })
            .await;
        assert_eq!(room.unwrap().granted(), 2);
    }

    #[tokio::test]
    async fn what_settles_during_a_count_is_not_forgotten() {
        let undecided = Undecided::new(10);
        granted(&undecided, 4, 0).await.settle(4);
        let slow = granted(&undecided, 4, 4).await;
        let room = undecided
            .reserve("payment", 4, |_| async move {
                // This count was read before the slow call committed.
                slow.settle(4);
                Ok(4)
            })
            .await;
        assert_eq!(room.unwrap().granted(), 2);
    }
}
