//! Consumes the subscription's queue and acks what is answered.
//!
//! What ends its process takes with it what was prefetched beside it, and RabbitMQ counts that
//! against all of them: after five returns it drops them together. So every channel begins with a
//! prefetch of one, and takes its whole prefetch once a message comes that has not come back
//! before; and a channel that meets one that has lets go of its prefetch again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::SelectAll;
use handfast_fail_points::{Point, hit};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::door::{Door, Kind, Open, Trouble, command};
use super::held::{Acks, Held, Key, key_of};
use super::{LAST_BACKOFF, wire};
use crate::backoff::Backoff;
use crate::message::Delivered;
use crate::source::reachable::Reachable;
use crate::source::{Order, Recorded};

/// A quorum queue gives one consumer no more than this, so a larger prefetch takes several.
const MAX_CONSUMER_PREFETCH: u32 = 2_000;
/// A channel that lived this long was a good one: the next trouble is a new trouble.
const GOOD: Duration = Duration::from_secs(1);
/// How long nothing comes, and nothing is held, before the channel is opened anew. RabbitMQ can
/// forget a consumer without a word, as when its queue is deleted and is back at once.
const QUIET: Duration = Duration::from_secs(10);
/// How often it is said that messages are thrown away, at most.
const UNREADABLE_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Receive {
    pub(super) door: Door,
    pub(super) queue: ShortString,
    pub(super) order: Order,
    pub(super) deliveries: mpsc::Sender<Delivered>,
    /// Which answers are confirmed, since the last time.
    pub(super) recorded: mpsc::UnboundedReceiver<Vec<Key>>,
    pub(super) stop: CancellationToken,
    /// Deliveries, of this channel and of earlier ones, whose answer is not confirmed.
    pub(super) held: Held,
    pub(super) unreadable: Unreadable,
}

/// Why a channel that is not lost is of no more use.
enum End {
    /// Nothing came for long.
    Quiet,
    /// It met what came back unanswered, and everything on it is answered now.
    Careful,
    Drained,
}

/// The consumers of one channel.
struct Consuming {
    channel: Channel,
    streams: SelectAll<Consumer>,
    tags: Vec<ShortString>,
    /// The sum of their prefetches.
    granted: u32,
}

impl Receive {
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let mut backoff = Backoff::up_to(LAST_BACKOFF);
        let mut reachable = Reachable::new("receive deliveries");
        let mut open: Option<Open> = None;
        while !stop.is_cancelled() {
            let channel = tokio::select! {
                channel = self.channel(&mut open) => channel,
                () = stop.cancelled() => break,
            };
            let end = match channel {
                Ok(channel) => {
                    let since = Instant::now();
                    let end = self.pump(channel, &mut reachable).await;
                    // RabbitMQ has taken everything back that is not acked.
                    self.held.lose_tags();
                    if since.elapsed() >= GOOD {
                        backoff.reset();
                    }
                    end
                }
                Err(trouble) => Err(trouble),
            };
            let trouble = match end {
                Ok(End::Quiet | End::Careful) => continue,
                Ok(End::Drained) => break,
                Err(trouble) => trouble,
            };
            reachable.no(self.door.address().shown(), trouble.kind, &trouble.reason);
            if trouble.fatal {
                open = None;
            }
            tokio::select! {
                () = sleep(backoff.next()) => {}
                () = stop.cancelled() => {}
            }
        }
        if let Some(open) = open {
            open.close().await;
        }
        // What is in work is still answered, and the link lasts until it is.
        while !self.held.is_empty() {
            match self.recorded.recv().await {
                Some(keys) => drop(self.held.settle(&keys)),
                None => return,
            }
        }
    }

    /// A channel of the open connection, or of a new one.
    async fn channel(&mut self, open: &mut Option<Open>) -> Result<Channel, Trouble> {
        while let Ok(keys) = self.recorded.try_recv() {
            self.held.settle(&keys);
        }
        let open = match open {
            Some(open) => open,
            None => open.insert(self.door.connect().await?),
        };
        open.channel().await
    }

    /// Receives until the channel is lost or long quiet, or until everything is answered after
    /// `stop`, or after the meeting with one that came back.
    async fn pump(
        &mut self,
        channel: Channel,
        reachable: &mut Reachable<Kind>,
    ) -> Result<End, Trouble> {
        let mut consuming = Consuming {
            channel,
            streams: SelectAll::new(),
            tags: Vec::new(),
            granted: 0,
        };
        let mut pace = Pace::OneByOne;
        let mut cancelled = false;
        let mut quiet = Instant::now() + QUIET;
        loop {
            if cancelled {
                if consuming.streams.is_empty() && self.held.is_empty() {
                    return Ok(match self.stop.is_cancelled() {
                        true => End::Drained,
                        false => End::Careful,
                    });
                }
            } else if self.stop.is_cancelled() || pace == Pace::LettingGo {
                cancelled = true;
                consuming.cancel().await?;
            } else {
                consuming
                    .grant(self.credit(consuming.granted, pace), self)
                    .await?;
                reachable.yes(self.door.address().shown());
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if !cancelled => {}
                received = consuming.streams.next(), if !consuming.streams.is_empty() => {
                    quiet = Instant::now() + QUIET;
                    match received {
                        Some(delivery) => {
                            let came_back = self.pass_on(delivery?, &consuming.channel).await?;
                            pace = pace.after(came_back);
                        }
                        None if cancelled => {}
                        None => return Err(Trouble::passing(
                            Kind::Cancelled,
                            "RabbitMQ ended the consumer, as it does when its queue is deleted",
                        )),
                    }
                }
                keys = self.recorded.recv() => match keys {
                    Some(keys) => {
                        let acks = self.held.settle(&keys);
                        ack(&consuming.channel, acks).await?;
                        hit(Point::CONSUMER_ANSWERED);
                    }
                    // Nobody can answer any more; what is held returns with the channel.
                    None => return Ok(End::Drained),
                },
                () = sleep_until(quiet), if !cancelled && self.held.is_empty() => {
                    return Ok(End::Quiet);
                }
            }
        }
    }

    /// What may be asked for beside what is granted already. What earlier channels delivered
    /// and is still in work takes part of the prefetch until all of it is answered.
    fn credit(&self, granted: u32, pace: Pace) -> u32 {
        let free = match (granted, self.held.lost()) {
            (0, lost) => self.order.prefetch.saturating_sub(lost),
            (granted, 0) => self.order.prefetch - granted,
            _ => 0,
        };
        match pace {
            Pace::Whole => free,
            Pace::OneByOne | Pace::LettingGo => free.min(1_u32.saturating_sub(granted)),
        }
    }

    /// Says whether it had come back before; None if it could not be read.
    async fn pass_on(
        &mut self,
        delivery: Delivery,
        channel: &Channel,
    ) -> Result<Option<bool>, Trouble> {
        let tag = delivery.delivery_tag;
        match wire::read(delivery, &self.order.subscription) {
            Ok(message) => {
                let came_back = message.alone;
                self.held.take(key_of(&message), tag);
                // It fails only if the consumer is gone, which ends this task too.
                let _ = self.deliveries.send(message).await;
                Ok(Some(came_back))
            }
            Err(reason) => {
                self.held.pass(tag);
                self.unreadable.observe(&self.queue, &reason);
                let away = BasicRejectOptions { requeue: false };
                command("a reject", channel.basic_reject(tag, away)).await?;
                Ok(None)
            }
        }
    }
}

/// How much a channel asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// One, and the next when it is answered.
    OneByOne,
    /// The whole prefetch.
    Whole,
    /// Nothing more: one is here that came back, and it is to be here alone.
    LettingGo,
}

impl Pace {
    /// After a message that had come back, or had not; None if it could not be read.
    fn after(self, came_back: Option<bool>) -> Self {
        match (self, came_back) {
            (Self::OneByOne, Some(false)) => Self::Whole,
            (Self::Whole, Some(true)) => Self::LettingGo,
            (pace, _) => pace,
        }
    }
}

impl Consuming {
    /// Lets RabbitMQ send so many more than before.
    async fn grant(&mut self, mut credit: u32, to: &Receive) -> Result<(), Trouble> {
        while credit > 0 {
            let part = credit.min(MAX_CONSUMER_PREFETCH);
            // At most 2,000, which fits. It holds for the consumers that follow.
            let qos = self
                .channel
                .basic_qos(part as u16, BasicQosOptions::default());
            command("a prefetch", qos).await?;
            // RabbitMQ shows the tag to people; the number keeps it unique on the channel.
            let tag = format!("{} {}", to.order.consumer, self.tags.len() + 1);
            let consumer = self.channel.basic_consume(
                to.queue.clone(),
                ShortString::try_new(tag).unwrap_or_default(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            );
            let consumer = command("a consumer", consumer).await?;
            self.tags.push(consumer.tag());
            self.streams.push(consumer);
            self.granted += part;
            credit -= part;
        }
        Ok(())
    }

    /// Asks for nothing more. What was on its way still comes, then the streams end.
    async fn cancel(&mut self) -> Result<(), Trouble> {
        for tag in self.tags.drain(..) {
            let cancel = self
                .channel
                .basic_cancel(tag, BasicCancelOptions::default());
            command("a cancel", cancel).await?;
        }
        Ok(())
    }
}

async fn ack(channel: &Channel, acks: Acks) -> Result<(), Trouble> {
    if let Some(tag) = acks.through {
        let all = BasicAckOptions { multiple: true };
        command("an ack", channel.basic_ack(tag, all)).await?;
    }
    for tag in acks.single {
        command("an ack", channel.basic_ack(tag, BasicAckOptions::default())).await?;
    }
    Ok(())
}

/// Counts what is thrown away, and says so now and then.
pub(super) struct Unreadable {
    done: Arc<Recorded>,
    said: Option<Instant>,
}

impl Unreadable {
    pub(super) fn new(done: Arc<Recorded>) -> Self {
        Self { done, said: None }
    }

    fn observe(&mut self, queue: &ShortString, reason: &str) {
        let count = self.done.unreadable.fetch_add(1, Ordering::Relaxed) + 1;
        if self
            .said
            .is_none_or(|said| said.elapsed() >= UNREADABLE_EVERY)
        {
            self.said = Some(Instant::now());
            tracing::error!(
                %queue,
                reason,
                count,
                "threw away a message that cannot be read; the service sends a real one again"
            );
        }
    }
}
