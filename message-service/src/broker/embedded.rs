//! The broker that is none: a consumer's credit on its gRPC stream is a claim on due
//! deliveries, leased to that stream.
//!
//! It holds nothing but what open streams have, so a million waiting deliveries cost it no
//! memory. SENT means written to the stream. A delivery whose stream ends unanswered is due
//! again at once; that is not an attempt, but it is sent alone from then on.
//!
//! [`session`] is the seam to the API, `held` the memory, `turn` the decision what a stream
//! does next, `stream` the task that does it, `settle` what is written about it.

mod held;
pub mod session;
mod settle;
mod stream;
mod turn;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub use session::{Grants, Sending, Sendings, Session};

use crate::broker::{AnswerState, Broker, BrokerState, Permit, QueueState};
use crate::clock::Clock;
use crate::message::MessageId;
use crate::store::{Due, Handed, Heard, Overdue, Store};
use crate::topology::Snapshot;
use held::State;

/// How long [`Embedded::shutdown`] waits until what streams held is back in the store. It
/// only saves the next start from waiting: that finds all leases void.
const RETURN_WITHIN: Duration = Duration::from_secs(5);

/// How streams are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a claim lasts until SENT is written.
    pub lease: Duration,
    /// When the silence of a delivery that is SENT is looked at; and after this long without
    /// any movement, a stream no longer waits for an answer before it sends on.
    pub resend_after: Duration,
    /// How late SENT is written. What is answered sooner is never marked. Cut to a quarter of
    /// the lease, because SENT ends the lease.
    pub sent_flush: Duration,
    /// Streams over all subscriptions.
    pub max_streams: usize,
    /// How often a stream with credit looks for due deliveries when nothing signals any.
    pub poll: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(30),
            resend_after: Duration::from_secs(45),
            sent_flush: Duration::from_secs(1),
            max_streams: 1_000,
            poll: Duration::from_secs(1),
        }
    }
}

/// There are as many streams as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{most} streams are open, which is the most there may be")]
pub struct TooManyStreams {
    /// The limit.
    pub most: usize,
}

/// The embedded broker.
pub struct Embedded {
    store: Arc<dyn Store>,
    topology: Arc<Snapshot>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    state: Mutex<State>,
    /// Signalled when a stream lets something go.
    released: Notify,
    /// Ends all streams.
    closing: CancellationToken,
    /// Ends what is left when the time for stopping is over.
    stopped: CancellationToken,
    marks_sent: AtomicBool,
}

impl Embedded {
    /// Serves deliveries of this store.
    pub fn new(
        store: Arc<dyn Store>,
        topology: Arc<Snapshot>,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            topology,
            clock,
            settings,
            state: Mutex::default(),
            released: Notify::new(),
            closing: CancellationToken::new(),
            stopped: CancellationToken::new(),
            marks_sent: AtomicBool::new(false),
        })
    }

    /// Opens a stream for a consumer of this subscription; it has no credit yet. It must be
    /// called within a runtime, because the stream is served by a task of its own, which
    /// outlives the session until everything it held is back in the store.
    pub fn open(
        self: &Arc<Self>,
        subscription: String,
        consumer: String,
    ) -> Result<Session, TooManyStreams> {
        let over = self.closing.child_token();
        let mut state = self.lock();
        if state.streams >= self.settings.max_streams {
            return Err(TooManyStreams {
                most: self.settings.max_streams,
            });
        }
        tracing::info!(subscription, consumer, "stream of {subscription} opened");
        let (id, wake) = state.add(
            &subscription,
            consumer,
            over.clone(),
            self.clock.monotonic(),
        );
        drop(state);
        if !self.marks_sent.swap(true, Ordering::Relaxed) {
            tokio::spawn(settle::mark_sent(
                Arc::downgrade(self),
                self.sent_flush(),
                self.stopped.clone(),
            ));
        }
        let (session, batches) =
            session::channel(Arc::clone(self), subscription.clone(), id, &over);
        tokio::spawn(
            stream::Serving::new(Arc::clone(self), subscription, id, wake, over).run(batches),
        );
        Ok(session)
    }

    /// The service begins to stop: nothing is claimed any more. Streams stay open, so that
    /// answers in flight can arrive.
    pub fn drain(&self) {
        let mut state = self.lock();
        state.draining = true;
        state.wake_all();
    }

    /// Stops: drains until everything on the streams is answered, but no longer than
    /// `answers_within`; then closes the streams and returns what they held, which does not
    /// count against it. Takes at most 5 s longer than `answers_within`.
    pub async fn shutdown(&self, answers_within: Duration) {
        self.drain();
        self.wait_until(answers_within, |state| state.held() == 0)
            .await;
        self.closing.cancel();
        self.lock().wake_all();
        self.wait_until(RETURN_WITHIN, |state| state.streams == 0)
            .await;
        self.stopped.cancel();
    }

    /// Waits for the state to be so, but no longer than this.
    async fn wait_until(&self, at_most: Duration, so: impl Fn(&State) -> bool) {
        let wait = async {
            loop {
                // Registered before looking, so that no change in between is missed.
                let released = self.released.notified();
                if so(&self.lock()) {
                    return;
                }
                released.await;
            }
        };
        // Whether the time was enough is read from the state by whoever wants to know.
        let _ = tokio::time::timeout(at_most, wait).await;
    }

    fn sent_flush(&self) -> Duration {
        self.settings.sent_flush.min(self.settings.lease / 4)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held can at worst leave a delivery held by a stream that
        // is gone, which its recovery heals.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Broker for Embedded {
    fn due(&self, topics: &BTreeSet<String>) {
        let topology = self.topology.get();
        let mut state = self.lock();
        for (name, queue) in &mut state.queues {
            // A subscription that the topology does not show may be newer than the topology.
            let known = topology.subscriptions.get(name);
            if known.is_none_or(|known| topics.contains(&known.topic)) {
                queue.signals += 1;
                queue.wake_all();
            }
        }
    }

    /// Each stream looks by itself.
    fn look_at(&self, _: &Due) {}

    /// Streams claim what they have credit for, and that is known only at their turn.
    fn permit(&self, _: usize) -> Permit {
        Permit::none()
    }

    async fn hand_over(&self, _: Permit, _: Vec<Handed>) {}

    fn answered(&self, subscription: &str, ids: &[MessageId]) {
        let now = self.clock.monotonic();
        if let Some(queue) = self.lock().queue(subscription) {
            queue.answered(ids, now);
        }
        self.released.notify_waiters();
    }

    /// There is nobody else.
    fn heard(&self, _: &Heard) {}

    fn holds(&self) -> u64 {
        self.lock().held() as u64
    }

    async fn is_gone(&self, subscription: &str, overdue: &[Overdue]) -> Vec<bool> {
        let mut state = self.lock();
        let queue = state.queue(subscription);
        overdue
            .iter()
            .map(|overdue| {
                queue
                    .as_ref()
                    .is_none_or(|queue| !queue.holds(overdue.id, overdue.generation))
            })
            .collect()
    }

    fn consumers(&self, subscription: &str) -> Option<u32> {
        let mut state = self.lock();
        let open = state
            .queue(subscription)
            .map_or(0, |queue| queue.consumers());
        Some(u32::try_from(open).unwrap_or(u32::MAX))
    }

    fn state(&self) -> BrokerState {
        BrokerState::Up
    }

    fn queue(&self, _subscription: &str) -> Option<QueueState> {
        None
    }

    fn answers(&self) -> AnswerState {
        AnswerState::default()
    }
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
