//! The lanes of the healthy queues: claim, publish, claim the next meanwhile.
//!
//! There are two with a channel each, so that a backlog takes half of what there is and no
//! more: one for what was confirmed within the last minute, one for everything that is due.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::RabbitMq;
use super::flight::{Carrier, Flight, Landed, Loaded, PATIENCE, Tag};
use super::queues::Pace;
use crate::pass::Trouble;
use crate::store::{Error, Lane};

/// Messages of one batch. RabbitMQ lets a connection send 400 messages into a channel and grants
/// more by 200, so at least 201 are free at any time: a batch below that can wait for a queue
/// that does not answer without stopping its connection, and with it everybody else.
pub(super) const BATCH: usize = 200;
/// Bytes of bodies in one batch.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// A lane looks for work this often if nothing is signalled.
const POLL: Duration = Duration::from_secs(1);
/// The wait after the store refused a claim, or RabbitMQ a channel.
const RETRY: Duration = Duration::from_millis(200);
/// The shortest wait for what is due soon.
const SHORTEST: Duration = Duration::from_millis(5);

/// What a round of claims brought.
#[derive(Default)]
struct Gathered {
    loaded: Vec<Loaded>,
    /// When more is due, if that is known and soon.
    next_due_in: Option<Duration>,
}

/// One of the two lanes.
pub(super) struct Running {
    rabbit: Arc<RabbitMq>,
    pace: Pace,
    carrier: Option<Carrier>,
    trouble: Trouble,
}

impl Running {
    pub(super) fn new(rabbit: Arc<RabbitMq>, pace: Pace) -> Self {
        let name = match pace {
            Pace::Fresh => "sending fresh deliveries",
            Pace::Drain => "sending due deliveries",
        };
        Self {
            rabbit,
            pace,
            carrier: None,
            trouble: Trouble::new(name),
        }
    }

    /// Sends until the broker drains. What is under way then lands by itself.
    pub(super) async fn run(mut self) {
        let mut gathered = Gathered::default();
        while let Some(carrier) = self.carrier().await {
            if gathered.loaded.is_empty() {
                gathered = self.gather().await;
            }
            if gathered.loaded.is_empty() {
                self.carrier = Some(carrier);
                if self.wait(gathered.next_due_in).await {
                    continue;
                }
                return;
            }
            let loaded = std::mem::take(&mut gathered.loaded);
            let flying = self.take_off(carrier, loaded).await;
            // While one batch is under way, the next is claimed.
            if self.may_claim() {
                gathered = self.gather().await;
            }
            self.follow(flying, &mut gathered).await;
        }
        self.rabbit.give_back(gathered.loaded).await;
    }

    fn may_claim(&self) -> bool {
        self.rabbit.publishing.is_up() && !self.rabbit.draining.is_cancelled()
    }

    /// Waits until something can be sent at all. `None` when the broker drains.
    async fn carrier(&mut self) -> Option<Carrier> {
        loop {
            let opened = tokio::select! {
                biased;
                () = self.rabbit.draining.cancelled() => return None,
                opened = self.rabbit.publishing.ready() => opened,
            };
            if let Some(carrier) = self.carrier.take().filter(Carrier::is_usable) {
                return Some(carrier);
            }
            match self.trouble.note(Carrier::open(opened).await) {
                Some(carrier) => return Some(carrier),
                None => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Waits for a signal, a time that is due, or the next look.
    async fn wait(&self, next_due_in: Option<Duration>) -> bool {
        let wait = next_due_in.map_or(POLL, |due| due.clamp(SHORTEST, POLL));
        tokio::select! {
            () = self.rabbit.draining.cancelled() => false,
            () = self.rabbit.signals[self.pace as usize].notified() => true,
            () = tokio::time::sleep(wait) => {
                self.rabbit.queues.look_again();
                true
            }
        }
    }

    /// Claims for everybody in turn until a batch is full.
    async fn gather(&mut self) -> Gathered {
        let mut gathered = Gathered::default();
        let mut bytes = BATCH_BYTES;
        for subscription in self.rabbit.queues.turns(self.pace) {
            let left = BATCH - gathered.loaded.len();
            if left == 0 || bytes == 0 {
                self.rabbit.queues.more(self.pace, &subscription);
                continue;
            }
            let limit = self.rabbit.queues.reserve(&subscription, left);
            if limit == 0 {
                continue;
            }
            let claimed = self.claim(&subscription, limit, bytes).await;
            let Some((loaded, next_due_in)) = claimed else {
                self.rabbit.queues.landed(&subscription, limit as u64, 0);
                self.rabbit.queues.more(self.pace, &subscription);
                tokio::time::sleep(RETRY).await;
                break;
            };
            let taken: usize = loaded.iter().map(body_bytes).sum();
            bytes = bytes.saturating_sub(taken);
            if loaded.len() == limit || next_due_in == Some(Duration::ZERO) {
                self.rabbit.queues.more(self.pace, &subscription);
            }
            let unused = limit - loaded.len();
            self.rabbit.queues.landed(&subscription, unused as u64, 0);
            self.rabbit.queues.served(self.pace, &subscription);
            gathered.next_due_in = [gathered.next_due_in, next_due_in]
                .into_iter()
                .flatten()
                .min();
            gathered.loaded.extend(loaded);
        }
        gathered
    }

    async fn claim(
        &mut self,
        subscription: &str,
        limit: usize,
        max_bytes: usize,
    ) -> Option<(Vec<Loaded>, Option<Duration>)> {
        let lane = match self.pace {
            Pace::Fresh => Lane::Fresh { limit, max_bytes },
            Pace::Drain => Lane::Normal { limit, max_bytes },
        };
        let claimed = self.rabbit.claim(subscription, lane).await;
        let (loaded, claimed) = self.trouble.note(claimed)?;
        // Only the lane that takes everything needs to know when something is due again.
        let next = (self.pace == Pace::Drain).then_some(claimed).flatten();
        Some((loaded, next))
    }

    async fn take_off(&self, carrier: Carrier, loaded: Vec<Loaded>) -> Flying {
        let rabbit = &self.rabbit;
        let flight = Flight::start(rabbit, &rabbit.publishing, carrier, loaded).await;
        Flying {
            tag: flight.tag(),
            landing: rabbit.tasks.spawn(flight.land()),
        }
    }

    /// Follows a flight until it lands; or, if that takes long, leaves it alone with its queues
    /// and goes on with the others.
    async fn follow(&mut self, mut flying: Flying, gathered: &mut Gathered) {
        loop {
            match timeout(2 * PATIENCE, &mut flying.landing).await {
                Ok(landed) => {
                    self.carrier = landed.ok().and_then(|landed| landed.carrier);
                    return;
                }
                // Nobody is served then, and the flight goes on when it is over.
                Err(_) if self.rabbit.publishing.is_blocked() => {}
                Err(_) => break,
            }
        }
        flying.tag.leave_alone(&self.rabbit.queues);
        let loaded = std::mem::take(&mut gathered.loaded);
        let (open, held_up) = loaded
            .into_iter()
            .partition(|loaded| self.rabbit.queues.is_open(&loaded.subscription));
        gathered.loaded = open;
        self.rabbit.give_back(held_up).await;
    }
}

/// A flight that is followed.
struct Flying {
    tag: Tag,
    landing: JoinHandle<Landed>,
}

fn body_bytes(loaded: &Loaded) -> usize {
    let claim = &loaded.claim;
    let headers = claim.headers.iter().map(|(n, v)| n.len() + v.len());
    claim.payload.len() + headers.sum::<usize>()
}

impl RabbitMq {
    /// Claims for a subscription. What must go alone is noted for whoever sends that.
    pub(super) async fn claim(
        &self,
        subscription: &str,
        lane: Lane,
    ) -> Result<(Vec<Loaded>, Option<Duration>), Error> {
        let claimed_at = self.clock.monotonic();
        let lease = self.settings.lease;
        let claimed = self
            .store
            .claim_deliveries(subscription, lane, lease)
            .await?;
        if claimed.alone_waits {
            self.queues.alone_waits(subscription);
            self.alone.notify_one();
        }
        let load = |claim| Loaded {
            subscription: subscription.to_owned(),
            claim,
            claimed_at,
        };
        let loaded = claimed.deliveries.into_iter().map(load).collect();
        Ok((loaded, claimed.next_due_in))
    }
}
