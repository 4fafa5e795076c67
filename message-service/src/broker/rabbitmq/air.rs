//! The flights of one lane that are in the air, and whether another may start.
//!
//! Bounded by channels, by bytes, and for each queue: while one batch is confirmed, the next ones are
//! read and written, so that what is confirmed now does not wait for what was confirmed before.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::RabbitMq;
use super::flight::{Landed, PATIENCE, Tag};
use crate::store::Error;

/// Channels of one lane.
const CHANNELS: usize = 8;
/// Flights to one queue.
const FLIGHTS: usize = 4;
/// Bytes of bodies that one lane has claimed and not sent.
const BYTES: usize = 16 * 1024 * 1024;
/// Nothing starts with less: a flight is worth more than a message or two.
const LEAST_BYTES: usize = 1024 * 1024;

/// How a flight landed, or why it did not start.
type Landing = Result<Landed, Error>;

/// The flights of one lane that are followed.
pub(super) struct Air {
    rabbit: Arc<RabbitMq>,
    followed: FuturesUnordered<BoxFuture<'static, Ended>>,
    /// Flights to each queue.
    to: BTreeMap<String, usize>,
    all: Load,
    /// What of it needed no claim.
    handed: Load,
}

#[derive(Clone, Copy, Default)]
struct Load {
    flights: usize,
    bytes: usize,
}

impl Load {
    fn add(&mut self, bytes: usize) {
        self.flights += 1;
        self.bytes += bytes;
    }

    fn sub(&mut self, bytes: usize) {
        self.flights -= 1;
        self.bytes -= bytes;
    }
}

struct Ended {
    subscription: String,
    bytes: usize,
    is_handed: bool,
    /// None if it was left alone.
    landing: Option<Landing>,
}

impl Air {
    pub(super) fn new(rabbit: Arc<RabbitMq>) -> Self {
        Self {
            rabbit,
            followed: FuturesUnordered::new(),
            to: BTreeMap::new(),
            all: Load::default(),
            handed: Load::default(),
        }
    }

    /// Whether anything may start at all.
    pub(super) fn has_room(&self) -> bool {
        self.all.flights < CHANNELS && self.bytes_left() >= LEAST_BYTES
    }

    /// Whether a flight to this queue may start.
    pub(super) fn may_start(&self, subscription: &str) -> bool {
        let to = self.to.get(subscription).copied().unwrap_or_default();
        self.has_room() && to < FLIGHTS
    }

    /// The same for what needs no claim. It has half of what there is, and not all flights to a
    /// queue, so that what has to be claimed has its turn, too.
    pub(super) fn may_start_handed(&self, subscription: &str) -> bool {
        let to = self.to.get(subscription).copied().unwrap_or_default();
        let handed = self.handed.flights < CHANNELS / 2 && self.handed_bytes_left() > 0;
        handed && to < FLIGHTS - 1 && self.has_room()
    }

    /// Bytes that may be claimed.
    pub(super) fn bytes_left(&self) -> usize {
        BYTES.saturating_sub(self.all.bytes)
    }

    /// Bytes that may start without a claim.
    pub(super) fn handed_bytes_left(&self) -> usize {
        let left = (BYTES / 2).saturating_sub(self.handed.bytes);
        left.min(self.bytes_left())
    }

    /// Follows a flight.
    pub(super) fn add(
        &mut self,
        subscription: String,
        bytes: usize,
        tag: Tag,
        landing: JoinHandle<Landing>,
    ) {
        self.follow(subscription, bytes, tag, landing, false);
    }

    /// Follows a flight that needed no claim.
    pub(super) fn add_handed(
        &mut self,
        subscription: String,
        bytes: usize,
        tag: Tag,
        landing: JoinHandle<Landing>,
    ) {
        self.handed.add(bytes);
        self.follow(subscription, bytes, tag, landing, true);
    }

    fn follow(
        &mut self,
        subscription: String,
        bytes: usize,
        tag: Tag,
        landing: JoinHandle<Landing>,
        is_handed: bool,
    ) {
        self.all.add(bytes);
        *self.to.entry(subscription.clone()).or_default() += 1;
        let rabbit = Arc::clone(&self.rabbit);
        // In a task of its own: its queue is left alone in time, whatever the lane waits for.
        let followed = async move { until_late(&rabbit, &tag, landing).await };
        let followed = AbortOnDropHandle::new(tokio::spawn(followed));
        let ended = async move {
            Ended {
                subscription,
                bytes,
                is_handed,
                landing: followed.await.ok().flatten(),
            }
        };
        self.followed.push(ended.boxed());
    }

    /// The next flight that lands; None if it takes long and is left alone with its queue. Never
    /// returns while nothing is in the air.
    pub(super) async fn landed(&mut self) -> Option<Landing> {
        let Some(ended) = self.followed.next().await else {
            return std::future::pending().await;
        };
        self.all.sub(ended.bytes);
        if ended.is_handed {
            self.handed.sub(ended.bytes);
        }
        if let Some(to) = self.to.get_mut(&ended.subscription) {
            *to -= 1;
            if *to == 0 {
                self.to.remove(&ended.subscription);
            }
        }
        ended.landing
    }
}

/// How a flight landed; None if it takes so long that it is left alone.
async fn until_late(
    rabbit: &RabbitMq,
    tag: &Tag,
    mut landing: JoinHandle<Landing>,
) -> Option<Landing> {
    loop {
        match timeout(2 * PATIENCE, &mut landing).await {
            Ok(Ok(landed)) => return Some(landed),
            // It panicked, and its leases end by themselves.
            Ok(Err(_)) => return None,
            // Nobody is served then, and the flight goes on when it is over.
            Err(_) if rabbit.publishing.is_blocked() => {}
            // It still waits for the store, which is not its queue's fault.
            Err(_) if !tag.has_started() => {}
            Err(_) => {
                tag.leave_alone(&rabbit.queues);
                return None;
            }
        }
    }
}
