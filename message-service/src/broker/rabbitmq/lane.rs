//! The lanes of the healthy queues: claim, publish, claim the next meanwhile.
//!
//! What a confirm has leased to this process needs no claim; the fresh lane takes it first.
//!
//! There are two, so that a backlog takes half of what there is and no more: one for what was
//! confirmed a moment ago, one for everything that is due. Each batch is for one queue
//! and flies on a channel of its own: a channel works off what it is given in order and stands
//! still at a queue that does not answer, and then it must hold nobody else's messages.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::RabbitMq;
use super::air::Air;
use super::flight::{Carrier, Flight, Loaded};
use super::queues::Pace;
use crate::broker::handoff::Leased;
use crate::pass::Trouble;
use crate::store::{Error, Lane};

/// Messages of one batch. RabbitMQ lets a connection send 400 messages into a channel and grants
/// more by 200, so at least 201 are free at any time: a batch below that can wait for a queue
/// that does not answer without stopping its connection, and with it everybody else.
pub(super) const BATCH: usize = 200;
/// A lane looks for work this often if nothing is signalled: looks that tell it see no lease that
/// a clock which was set back has left far away.
const POLL: Duration = Duration::from_secs(30);
/// What is due within this time is waited for; what is due later, a look will find.
const SOON: Duration = Duration::from_secs(1);
/// The wait after the store refused a claim, or RabbitMQ a channel.
const RETRY: Duration = Duration::from_millis(200);
/// The shortest wait for what is due soon.
const SHORTEST: Duration = Duration::from_millis(5);

/// One of the two lanes.
pub(super) struct Running {
    rabbit: Arc<RabbitMq>,
    pace: Pace,
    air: Air,
    /// Channels that carry nothing at the moment.
    carriers: Vec<Carrier>,
    /// When every queue was last looked at, signalled or not.
    looked_at: Instant,
    trouble: Trouble,
}

/// What a look for work has brought.
#[derive(Default)]
struct Started {
    flights: usize,
    /// When more is due, if that is known and soon.
    next_due_in: Option<Duration>,
}

impl Running {
    pub(super) fn new(rabbit: Arc<RabbitMq>, pace: Pace) -> Self {
        let name = match pace {
            Pace::Fresh => "sending fresh deliveries",
            Pace::Drain => "sending due deliveries",
        };
        Self {
            air: Air::new(Arc::clone(&rabbit)),
            rabbit,
            pace,
            carriers: Vec::new(),
            looked_at: Instant::now(),
            trouble: Trouble::new(name),
        }
    }

    /// Sends until the broker drains. What is under way then lands by itself.
    pub(super) async fn run(mut self) {
        // Nothing is claimed while there is no way to send it.
        while let Some(carrier) = self.carrier().await {
            self.carriers.push(carrier);
            // Nothing is signalled when a time comes, and a lane that is never idle would never
            // see it for a queue that is.
            if self.looked_at.elapsed() >= POLL {
                self.look_again();
            }
            let mut started = Started::default();
            if self.pace == Pace::Fresh {
                started.flights = self.start_handed().await;
            }
            self.start_claimed(&mut started).await;
            if started.flights == 0 && !self.wait(started.next_due_in).await {
                break;
            }
        }
        if self.pace == Pace::Fresh {
            let waiting = self.rabbit.handoffs.close();
            self.rabbit.give_up(waiting).await;
        }
    }

    /// A channel that carries nothing, as soon as there is one. None when the broker drains.
    async fn carrier(&mut self) -> Option<Carrier> {
        loop {
            let opened = tokio::select! {
                biased;
                () = self.rabbit.draining.cancelled() => return None,
                opened = self.rabbit.publishing.ready() => opened,
            };
            while let Some(carrier) = self.carriers.pop() {
                if carrier.is_usable() {
                    return Some(carrier);
                }
            }
            match self.trouble.note(Carrier::open(opened).await) {
                Some(carrier) => return Some(carrier),
                None => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Waits until a flight has landed or there may be work that may start. False when the
    /// broker drains.
    async fn wait(&mut self, next_due_in: Option<Duration>) -> bool {
        let soon = next_due_in.filter(|due| *due <= SOON);
        let wait = soon.map_or(POLL, |due| due.max(SHORTEST));
        let may_start = self.air.has_room();
        tokio::select! {
            () = self.rabbit.draining.cancelled() => return false,
            landed = self.air.landed() => {
                if let Some(landed) = landed.and_then(|landed| self.trouble.note(landed)) {
                    self.carriers.extend(landed.carrier);
                }
            }
            () = self.rabbit.signals[self.pace as usize].notified(), if may_start => {}
            () = tokio::time::sleep(wait), if may_start => self.look_again(),
        }
        true
    }

    fn look_again(&mut self) {
        self.looked_at = Instant::now();
        self.rabbit.queues.look_again();
    }

    /// Starts flights with what confirms have leased to this process, for each subscription in
    /// turn. They read the bodies themselves.
    async fn start_handed(&mut self) -> usize {
        let mut flights = 0;
        loop {
            let bytes = self.air.handed_bytes_left();
            let may = |name: &str| self.air.may_start_handed(name);
            let Some((subscription, mut leased)) = self.rabbit.handoffs.take(BATCH, bytes, may)
            else {
                return flights;
            };
            let mut room = 0;
            if self.rabbit.queues.is_open(&subscription) {
                room = self.rabbit.queues.reserve(&subscription, leased.len());
            }
            let unsent = leased.split_off(room);
            self.rabbit.give_up(unsent).await;
            if !leased.is_empty() {
                flights += 1;
                self.take_off_handed(subscription, leased).await;
            }
        }
    }

    async fn take_off_handed(&mut self, subscription: String, leased: Vec<Leased>) {
        let Some(carrier) = self.carrier().await else {
            let leased_here = leased.len() as u64;
            self.rabbit.queues.landed(&subscription, leased_here, 0);
            return self.rabbit.give_up(leased).await;
        };
        let bytes = leased.iter().map(|one| one.handed.body_bytes).sum();
        let (rabbit, tag) = (Arc::clone(&self.rabbit), self.rabbit.tag(&subscription));
        let landing = self.rabbit.tasks.spawn({
            let tag = tag.clone();
            async move {
                let _over = tag.until_over(&rabbit);
                let loaded = rabbit.load(leased).await?;
                let flight = Flight::start(&rabbit, &rabbit.publishing, tag, carrier, loaded);
                Ok(flight.await.land().await)
            }
        });
        self.air.add_handed(subscription, bytes, tag, landing);
    }

    /// Starts flights with what is due, for each subscription in turn.
    async fn start_claimed(&mut self, started: &mut Started) {
        let mut refused = false;
        for subscription in self.rabbit.queues.turns(self.pace) {
            let draining = self.rabbit.draining.is_cancelled();
            if refused || draining || !self.air.may_start(&subscription) {
                self.rabbit.queues.more(self.pace, &subscription);
                continue;
            }
            let queues = &self.rabbit.queues;
            let limit = queues.reserve_for(self.pace, &subscription, BATCH);
            if limit == 0 {
                self.rabbit.queues.more(self.pace, &subscription);
                continue;
            }
            let max_bytes = self.air.bytes_left();
            let claimed = self.claim(&subscription, limit, max_bytes).await;
            let Some((loaded, next_due_in)) = claimed else {
                let queues = &self.rabbit.queues;
                queues.claimed(self.pace, &subscription, limit, 0);
                queues.more(self.pace, &subscription);
                refused = true;
                continue;
            };
            // Cut off by number or by bytes, there is more.
            let bytes: usize = loaded.iter().map(body_bytes).sum();
            let is_cut = loaded.len() == limit || bytes >= max_bytes / 2;
            if is_cut || next_due_in == Some(Duration::ZERO) {
                self.rabbit.queues.more(self.pace, &subscription);
            }
            (self.rabbit.queues).claimed(self.pace, &subscription, limit, loaded.len());
            self.rabbit.queues.served(self.pace, &subscription);
            started.next_due_in = [started.next_due_in, next_due_in]
                .into_iter()
                .flatten()
                .min();
            if !loaded.is_empty() {
                started.flights += 1;
                self.take_off(subscription, loaded).await;
            }
        }
        if refused {
            tokio::time::sleep(RETRY).await;
        }
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

    async fn take_off(&mut self, subscription: String, loaded: Vec<Loaded>) {
        let Some(carrier) = self.carrier().await else {
            return self.rabbit.give_back(loaded).await;
        };
        let (rabbit, tag) = (Arc::clone(&self.rabbit), self.rabbit.tag(&subscription));
        let bytes = loaded.iter().map(body_bytes).sum();
        let landing = self.rabbit.tasks.spawn({
            let tag = tag.clone();
            async move {
                let _over = tag.until_over(&rabbit);
                let flight = Flight::start(&rabbit, &rabbit.publishing, tag, carrier, loaded);
                Ok(flight.await.land().await)
            }
        });
        self.air.add(subscription, bytes, tag, landing);
    }
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

    /// Reads the bodies of what was leased. What has none was reported, and is found again when
    /// its lease has ended.
    async fn load(&self, leased: Vec<Leased>) -> Result<Vec<Loaded>, Error> {
        let handed = leased.iter().map(|one| one.handed.clone()).collect();
        let claims = match self.store.load(handed).await {
            Ok(claims) => claims,
            Err(error) => {
                for one in &leased {
                    self.queues.landed(&one.handed.subscription, 1, 0);
                }
                self.give_up(leased).await;
                return Err(error);
            }
        };
        let mut loaded = Vec::with_capacity(leased.len());
        for (one, claim) in leased.into_iter().zip(claims) {
            let (subscription, claimed_at) = (one.handed.subscription, one.leased_at);
            match claim {
                Some(claim) => loaded.push(Loaded {
                    subscription,
                    claim,
                    claimed_at,
                }),
                None => self.queues.landed(&subscription, 1, 0),
            }
        }
        Ok(loaded)
    }
}
