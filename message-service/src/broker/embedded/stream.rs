//! The task of one stream: claims as the credit allows, hands over, and at the end returns
//! what was not answered.
//!
//! It is a task of its own, so that a client that vanishes in the middle of a claim leaves
//! nothing half-done: the claim comes to its end, and what it took is returned.

use std::sync::Arc;
use std::time::Duration;

use handfast_fail_points::{Point, hit};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::held::StreamId;
use super::turn::{Turn, View};
use super::{Embedded, Sending, settle};
use crate::store::{Claimed, Lane, Returned};

/// The most deliveries in one batch.
const MAX_BATCH: usize = 500;
/// The most bytes of bodies in one batch.
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// No stream looks more often than this, whatever the store says is due next.
const SHORTEST_WAIT: Duration = Duration::from_millis(5);

/// Serves one stream.
pub(super) struct Serving {
    embedded: Arc<Embedded>,
    subscription: String,
    id: StreamId,
    wake: Arc<Notify>,
    over: CancellationToken,
}

impl Serving {
    pub(super) fn new(
        embedded: Arc<Embedded>,
        subscription: String,
        id: StreamId,
        wake: Arc<Notify>,
        over: CancellationToken,
    ) -> Self {
        Self {
            embedded,
            subscription,
            id,
            wake,
            over,
        }
    }

    /// Serves until the client is gone, has enough, or the service stops.
    pub(super) async fn run(self, batches: mpsc::Sender<Vec<Sending>>) {
        self.serve(&batches).await;
        // From here on the stream is no consumer, and its client learns that it is over.
        self.over.cancel();
        drop(batches);
        self.give_back().await;
    }

    async fn serve(&self, batches: &mpsc::Sender<Vec<Sending>>) {
        loop {
            // `wake` keeps a signal that comes between this look and the wait below.
            match self.turn() {
                Turn::End => return,
                Turn::Wait => self.wait().await,
                Turn::Normal(_) | Turn::Alone => {
                    // Nothing is claimed before there is a place to put it.
                    let place = tokio::select! {
                        biased;
                        () = self.over.cancelled() => return,
                        place = batches.reserve() => place,
                    };
                    let Ok(place) = place else { return };
                    if let Some(batch) = self.claim().await {
                        place.send(batch);
                        hit(Point::DELIVER_AFTER_WRITE);
                    }
                }
            }
        }
    }

    fn turn(&self) -> Turn {
        let now = self.embedded.clock.monotonic();
        let patience = self.embedded.settings.resend_after;
        let mut state = self.embedded.lock();
        let draining = state.draining;
        state.queue(&self.subscription).map_or(Turn::End, |queue| {
            View {
                draining,
                ..queue.view(self.id, now, patience)
            }
            .turn()
        })
    }

    async fn wait(&self) {
        let now = self.embedded.clock.monotonic();
        let poll = self.embedded.settings.poll;
        let empty_until = self
            .embedded
            .lock()
            .queue(&self.subscription)
            .and_then(|queue| queue.empty_until(now));
        let wait = empty_until
            .map_or(poll, |until| until.saturating_sub(now).min(poll))
            .max(SHORTEST_WAIT);
        tokio::select! {
            () = self.over.cancelled() => {}
            () = self.wake.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }

    /// Claims what the stream may have now; `None` if that is nothing.
    async fn claim(&self) -> Option<Vec<Sending>> {
        let gate = Arc::clone(&self.embedded.lock().queue(&self.subscription)?.gate);
        let mut one_at_a_time = tokio::select! {
            () = self.over.cancelled() => return None,
            gate = gate.lock() => gate,
        };
        // Another stream may have taken everything while this one waited for its turn.
        let lane = match self.turn() {
            Turn::End | Turn::Wait => return None,
            Turn::Normal(most) => Lane::Normal {
                limit: most.min(MAX_BATCH),
                max_bytes: MAX_BATCH_BYTES,
            },
            Turn::Alone => Lane::Alone,
        };
        let signals = self.embedded.lock().queue(&self.subscription)?.signals;
        let claimed = self
            .embedded
            .store
            .claim_deliveries(&self.subscription, lane, self.embedded.settings.lease)
            .await;
        let Some(claimed) = one_at_a_time.trouble.note(claimed) else {
            // The gate stays closed meanwhile: one try per poll is enough for all streams.
            self.rest().await;
            return None;
        };
        let held = self.hold(&claimed, lane, signals);
        drop(one_at_a_time);
        let alone = lane == Lane::Alone;
        if held {
            let sendings = claimed.deliveries.into_iter();
            let batch: Vec<_> = sendings.map(|claim| Sending { claim, alone }).collect();
            return Some(batch).filter(|batch| !batch.is_empty());
        }
        // Nobody has seen it, so it goes back without counting.
        let unseen = claimed.deliveries.iter().map(|claim| Returned {
            id: claim.id,
            generation: claim.generation,
        });
        let unseen = unseen.collect();
        settle::give_back(&self.embedded, &self.subscription, unseen, false).await;
        None
    }

    /// The stream holds what was claimed for it; false if it ended, or the service began to
    /// stop, while the claim was under way.
    fn hold(&self, claimed: &Claimed, lane: Lane, signals: u64) -> bool {
        let now = self.embedded.clock.monotonic();
        let mut state = self.embedded.lock();
        let draining = state.draining;
        let Some(queue) = state.queue(&self.subscription) else {
            return false;
        };
        if let Some(until) = self.quiet_until(claimed, lane, now) {
            queue.found_all(signals, until);
        }
        let goes_on = !draining && !self.over.is_cancelled();
        if goes_on {
            queue.hold(self.id, claimed, lane == Lane::Alone, now);
        }
        goes_on
    }

    /// Until when nothing more is due, if the claim found all there was.
    fn quiet_until(&self, claimed: &Claimed, lane: Lane, now: Duration) -> Option<Duration> {
        // Zero says that more is due now.
        let next_due_in = claimed.next_due_in.filter(|wait| !wait.is_zero());
        let found_all = match lane {
            Lane::Alone => claimed.deliveries.is_empty(),
            Lane::Normal { limit, max_bytes } | Lane::Fresh { limit, max_bytes } => {
                let bytes: usize = claimed.deliveries.iter().map(settle::body_bytes).sum();
                // The claim also ends before a body that would not have fitted. One that is
                // larger than what is left here is possible, and then waits for the next poll.
                next_due_in.is_some() || (claimed.deliveries.len() < limit && bytes < max_bytes / 4)
            }
        };
        let poll = self.embedded.settings.poll;
        let wait = next_due_in.map_or(poll, |due| due.min(poll));
        found_all.then(|| now + wait.max(SHORTEST_WAIT))
    }

    /// After an error of the store: the poll is the retry, and signals do not shorten it.
    async fn rest(&self) {
        tokio::select! {
            () = self.over.cancelled() => {}
            () = tokio::time::sleep(self.embedded.settings.poll) => {}
        }
    }

    /// Returns what the stream held when it ended, then takes it off the list.
    async fn give_back(self) {
        let (held, counts) = {
            let mut state = self.embedded.lock();
            let counts = !state.draining;
            let consumer = state
                .stream(&self.subscription, self.id)
                .map(|stream| stream.consumer.clone());
            let queue = state.queue(&self.subscription);
            let held = queue
                .map(|queue| queue.held_by(self.id))
                .unwrap_or_default();
            tracing::info!(
                subscription = %self.subscription,
                consumer,
                unanswered = held.len(),
                "stream of {} ended", self.subscription
            );
            (held, counts)
        };
        settle::give_back(&self.embedded, &self.subscription, held, counts).await;
        let mut state = self.embedded.lock();
        state.remove(&self.subscription, self.id);
        state.signal(&self.subscription);
        drop(state);
        self.embedded.released.notify_waiters();
    }
}
