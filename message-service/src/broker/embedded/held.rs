//! What open streams hold, in memory: the embedded broker's queues.
//!
//! Nothing here waits, claims or writes. A queue is one subscription's open streams; it knows
//! for every unanswered delivery which stream has it, so that an answer, a resend to another
//! stream and the question "is it gone?" each cost one look.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::turn::View;
use crate::message::MessageId;
use crate::pass::Trouble;
use crate::store::{Claimed, DeliveryClaim, Returned, Sent};

/// The most credit a stream has, and the most unanswered deliveries it holds.
pub(super) const MAX_CREDIT: u32 = 10_000;

pub(super) type StreamId = u64;

/// All queues.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) queues: HashMap<String, Queue>,
    /// The service is stopping: no more claims.
    pub(super) draining: bool,
    /// Streams that are open or whose deliveries are on their way back.
    pub(super) streams: usize,
    last_stream: StreamId,
}

/// One subscription's streams.
#[derive(Debug)]
pub(super) struct Queue {
    /// Held while one stream claims, so that a signal to many streams is not as many claims
    /// that find nothing.
    pub(super) gate: Arc<tokio::sync::Mutex<Gate>>,
    /// Goes up whenever something may have become due.
    pub(super) signals: u64,
    /// Nothing was due as of this many signals, and nothing will be before this time.
    empty: Option<(u64, Duration)>,
    streams: HashMap<StreamId, Stream>,
    holders: HashMap<MessageId, StreamId>,
}

/// What the stream that claims may use.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) trouble: Trouble,
}

/// One open stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) consumer: String,
    pub(super) wake: Arc<Notify>,
    pub(super) over: CancellationToken,
    credit: u32,
    half_closed: bool,
    alone_waits: bool,
    alone: Option<MessageId>,
    owes_round: bool,
    /// Monotonic time of the last send or answer.
    moved_at: Duration,
    held: HashMap<MessageId, Held>,
}

/// A send whose answer is awaited.
#[derive(Clone, Copy, Debug)]
struct Held {
    generation: u32,
    token: Uuid,
    /// Monotonic time since which the lease runs.
    leased_at: Duration,
    /// SENT is durable.
    marked: bool,
}

impl State {
    /// A new stream on this subscription.
    pub(super) fn add(
        &mut self,
        subscription: &str,
        consumer: String,
        over: CancellationToken,
        now: Duration,
    ) -> (StreamId, Arc<Notify>) {
        self.last_stream += 1;
        self.streams += 1;
        let wake = Arc::new(Notify::new());
        let stream = Stream {
            consumer,
            wake: Arc::clone(&wake),
            over,
            credit: 0,
            half_closed: false,
            alone_waits: false,
            alone: None,
            owes_round: false,
            moved_at: now,
            held: HashMap::new(),
        };
        self.queues
            .entry(subscription.to_owned())
            .or_insert_with(|| Queue::new(subscription))
            .streams
            .insert(self.last_stream, stream);
        (self.last_stream, wake)
    }

    /// The stream is gone with everything it held. A queue without streams goes too.
    pub(super) fn remove(&mut self, subscription: &str, id: StreamId) {
        let Some(queue) = self.queues.get_mut(subscription) else {
            return;
        };
        if let Some(stream) = queue.streams.remove(&id) {
            self.streams -= 1;
            for message in stream.held.keys() {
                if queue.holders.get(message) == Some(&id) {
                    queue.holders.remove(message);
                }
            }
        }
        if queue.streams.is_empty() {
            self.queues.remove(subscription);
        }
    }

    /// Something of this subscription may be due now.
    pub(super) fn signal(&mut self, subscription: &str) {
        if let Some(queue) = self.queues.get_mut(subscription) {
            queue.signals += 1;
            queue.wake_all();
        }
    }

    pub(super) fn wake_all(&self) {
        self.queues.values().for_each(Queue::wake_all);
    }

    /// Unanswered deliveries on all streams.
    pub(super) fn held(&self) -> usize {
        self.queues.values().map(|queue| queue.holders.len()).sum()
    }

    pub(super) fn queue(&mut self, subscription: &str) -> Option<&mut Queue> {
        self.queues.get_mut(subscription)
    }

    pub(super) fn stream(&mut self, subscription: &str, id: StreamId) -> Option<&mut Stream> {
        self.queue(subscription)?.streams.get_mut(&id)
    }
}

impl Queue {
    fn new(subscription: &str) -> Self {
        let trouble = Trouble::new(format!("claiming deliveries of {subscription}"));
        Self {
            gate: Arc::new(tokio::sync::Mutex::new(Gate { trouble })),
            signals: 0,
            empty: None,
            streams: HashMap::new(),
            holders: HashMap::new(),
        }
    }

    /// Streams that are not over.
    pub(super) fn consumers(&self) -> usize {
        let streams = self.streams.values();
        streams.filter(|stream| !stream.over.is_cancelled()).count()
    }

    pub(super) fn wake_all(&self) {
        for stream in self.streams.values() {
            stream.wake.notify_one();
        }
    }

    /// Notes that a claim which began at this many signals found all that was due.
    pub(super) fn found_all(&mut self, signals: u64, until: Duration) {
        self.empty = Some((signals, until));
    }

    /// Until when nothing will be due, if that is known.
    pub(super) fn empty_until(&self, now: Duration) -> Option<Duration> {
        self.empty
            .filter(|(signals, until)| *signals == self.signals && now < *until)
            .map(|(_, until)| until)
    }

    /// What the stream may do.
    pub(super) fn view(&self, id: StreamId, now: Duration, patience: Duration) -> View {
        let Some(stream) = self.streams.get(&id) else {
            return View {
                over: true,
                ..View::default()
            };
        };
        View {
            credit: stream.credit as usize,
            room: (MAX_CREDIT as usize).saturating_sub(stream.held.len()),
            held: stream.held.len(),
            alone_out: stream.alone.is_some_and(|id| stream.held.contains_key(&id)),
            alone_waits: stream.alone_waits,
            owes_round: stream.owes_round,
            quiet: now.saturating_sub(stream.moved_at) >= patience,
            half_closed: stream.half_closed,
            draining: false,
            over: stream.over.is_cancelled(),
            nothing_due: self.empty_until(now).is_some(),
        }
    }

    /// The stream holds what was claimed for it. What another stream held with an earlier
    /// generation is not awaited there any more.
    pub(super) fn hold(&mut self, id: StreamId, claimed: &Claimed, alone: bool, now: Duration) {
        for claim in &claimed.deliveries {
            if let Some(before) = self.holders.insert(claim.id, id)
                && before != id
                && let Some(stream) = self.streams.get_mut(&before)
            {
                stream.held.remove(&claim.id);
                stream.wake.notify_one();
            }
        }
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        // Whether another one waits behind the one that was sent alone is seen with the round
        // of the others, which is owed now.
        stream.alone_waits = claimed.alone_waits && !alone;
        stream.owes_round = alone && !claimed.deliveries.is_empty();
        if claimed.deliveries.is_empty() {
            return;
        }
        stream.moved_at = now;
        if alone {
            stream.alone = claimed.deliveries.first().map(|claim| claim.id);
        }
        let sent = u32::try_from(claimed.deliveries.len()).unwrap_or(u32::MAX);
        stream.credit = stream.credit.saturating_sub(sent);
        let held = claimed
            .deliveries
            .iter()
            .map(|claim| (claim.id, Held::new(claim, now)));
        stream.held.extend(held);
    }

    /// These were answered: no stream holds them any more.
    pub(super) fn answered(&mut self, ids: &[MessageId], now: Duration) {
        for id in ids {
            if let Some(holder) = self.holders.remove(id)
                && let Some(stream) = self.streams.get_mut(&holder)
            {
                stream.held.remove(id);
                stream.moved_at = now;
                stream.wake.notify_one();
            }
        }
    }

    /// True if a stream holds this send.
    pub(super) fn holds(&self, id: MessageId, generation: u32) -> bool {
        self.holders
            .get(&id)
            .and_then(|holder| self.streams.get(holder)?.held.get(&id))
            .is_some_and(|held| held.generation == generation)
    }

    /// What the stream holds, for the way back.
    pub(super) fn held_by(&self, id: StreamId) -> Vec<Returned> {
        let stream = self.streams.get(&id);
        let held = stream.into_iter().flat_map(|stream| &stream.held);
        held.map(|(id, held)| Returned {
            id: *id,
            generation: held.generation,
        })
        .collect()
    }

    /// Sends that are not durably SENT, with the time since which their lease runs.
    pub(super) fn unmarked(&self) -> Vec<(Sent, Duration)> {
        let held = self.streams.values().flat_map(|stream| &stream.held);
        held.filter(|(_, held)| !held.marked)
            .map(|(id, held)| {
                let sent = Sent {
                    id: *id,
                    token: held.token,
                };
                (sent, held.leased_at)
            })
            .collect()
    }

    /// SENT is durable for these.
    pub(super) fn marked(&mut self, sent: &[Sent]) {
        self.each_held(sent, |held| held.marked = true);
    }

    /// The leases of these run from now.
    pub(super) fn renewed(&mut self, sent: &[Sent], now: Duration) {
        self.each_held(sent, |held| held.leased_at = now);
    }

    fn each_held(&mut self, sent: &[Sent], mut change: impl FnMut(&mut Held)) {
        for sent in sent {
            if let Some(holder) = self.holders.get(&sent.id)
                && let Some(stream) = self.streams.get_mut(holder)
                && let Some(held) = stream.held.get_mut(&sent.id)
                && held.token == sent.token
            {
                change(held);
            }
        }
    }
}

impl Stream {
    /// More credit, up to the most there is. None after the request side was closed.
    pub(super) fn grant(&mut self, credit: u32) {
        if !self.half_closed {
            self.credit = self.credit.saturating_add(credit).min(MAX_CREDIT);
            self.wake.notify_one();
        }
    }

    /// No more credit will come.
    pub(super) fn half_close(&mut self) {
        self.half_closed = true;
        self.wake.notify_one();
    }
}

impl Held {
    fn new(claim: &DeliveryClaim, now: Duration) -> Self {
        Self {
            generation: claim.generation,
            token: claim.token,
            leased_at: now,
            marked: false,
        }
    }
}
