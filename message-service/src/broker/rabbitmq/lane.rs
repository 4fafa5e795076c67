//! The lanes of the healthy queues: claim, publish, claim the next meanwhile.
//!
//! What a confirm has leased to this process needs no claim; the fresh lane takes it first.
//!
//! There are two, so that a backlog takes half of what there is and no more: one for what was
//! confirmed within the last minute, one for everything that is due. What a lane has claimed
//! for several queues flies on a channel for each: a channel works off what it is given in order
//! and stands still at a queue that does not answer, and then it must hold nobody else's messages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::RabbitMq;
use super::flight::{Carrier, Flight, Landed, Loaded, PATIENCE, Tag};
use super::queues::Pace;
use crate::pass::Trouble;
use crate::store::{Error, Lane};

/// Channels of one lane, and so queues that are sent to at the same time.
const CHANNELS: usize = 8;
/// Messages of one batch. RabbitMQ lets a connection send 400 messages into a channel and grants
/// more by 200, so at least 201 are free at any time: a batch below that can wait for a queue
/// that does not answer without stopping its connection, and with it everybody else.
pub(super) const BATCH: usize = 200;
/// Bytes of bodies that one lane has claimed and not sent.
const CLAIMED_BYTES: usize = 8 * 1024 * 1024;
/// A lane looks for work this often if nothing is signalled.
const POLL: Duration = Duration::from_secs(1);
/// The wait after the store refused a claim, or RabbitMQ a channel.
const RETRY: Duration = Duration::from_millis(200);
/// The shortest wait for what is due soon.
const SHORTEST: Duration = Duration::from_millis(5);

/// What a round of claims brought, for each queue.
#[derive(Default)]
struct Gathered {
    batches: Vec<Vec<Loaded>>,
    /// When more is due, if that is known and soon.
    next_due_in: Option<Duration>,
}

/// One of the two lanes.
pub(super) struct Running {
    rabbit: Arc<RabbitMq>,
    pace: Pace,
    /// Channels that carry nothing at the moment.
    carriers: Vec<Carrier>,
    /// When every queue was last looked at, signalled or not.
    looked_at: Instant,
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
            carriers: Vec::new(),
            looked_at: Instant::now(),
            trouble: Trouble::new(name),
        }
    }

    /// Sends until the broker drains. What is under way then lands by itself.
    pub(super) async fn run(mut self) {
        let mut gathered = Gathered::default();
        while let Some(carrier) = self.carrier().await {
            self.carriers.push(carrier);
            // Nothing is signalled when a time comes, and a lane that is never idle would never
            // see it for a queue that is.
            if self.looked_at.elapsed() >= POLL {
                self.look_again();
            }
            if gathered.batches.is_empty() {
                gathered = self.gather().await;
            }
            if gathered.batches.is_empty() {
                let handed_waits = self.pace == Pace::Fresh && self.rabbit.handoffs.turns() > 0;
                if handed_waits || self.wait(gathered.next_due_in).await {
                    continue;
                }
                break;
            }
            let batches = std::mem::take(&mut gathered.batches);
            let flying = self.take_off(batches).await;
            // While these are under way, the next are claimed.
            if self.may_claim() {
                gathered = self.gather().await;
            }
            self.follow(flying, &mut gathered).await;
        }
        for batch in gathered.batches {
            self.rabbit.give_back(batch).await;
        }
        if self.pace == Pace::Fresh {
            let waiting = self.rabbit.handoffs.close();
            self.rabbit.give_up(waiting).await;
        }
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

    /// Waits for a signal, a time that is due, or the next look.
    async fn wait(&mut self, next_due_in: Option<Duration>) -> bool {
        let wait = next_due_in.map_or(POLL, |due| due.clamp(SHORTEST, POLL));
        tokio::select! {
            () = self.rabbit.draining.cancelled() => false,
            () = self.rabbit.signals[self.pace as usize].notified() => true,
            () = tokio::time::sleep(wait) => {
                self.look_again();
                true
            }
        }
    }

    fn look_again(&mut self) {
        self.looked_at = Instant::now();
        self.rabbit.queues.look_again();
    }

    /// Claims a batch for each in turn, for as many as there are channels.
    async fn gather(&mut self) -> Gathered {
        let mut gathered = Gathered::default();
        let mut bytes = CLAIMED_BYTES;
        let mut refused = false;
        let mut handed = BTreeMap::new();
        if self.pace == Pace::Fresh {
            handed = self.take_handed(&mut bytes).await;
        }
        for subscription in self.rabbit.queues.turns(self.pace) {
            let channels = gathered.batches.len() + handed.len();
            let has_turn = handed.contains_key(&subscription);
            if channels == CHANNELS || bytes == 0 || refused || has_turn {
                self.rabbit.queues.more(self.pace, &subscription);
                continue;
            }
            let limit = self.rabbit.queues.reserve(&subscription, BATCH);
            if limit == 0 {
                self.rabbit.queues.more(self.pace, &subscription);
                continue;
            }
            let claimed = self.claim(&subscription, limit, bytes).await;
            let Some((loaded, next_due_in)) = claimed else {
                self.rabbit.queues.landed(&subscription, limit as u64, 0);
                self.rabbit.queues.more(self.pace, &subscription);
                refused = true;
                continue;
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
            if !loaded.is_empty() {
                gathered.batches.push(loaded);
            }
        }
        gathered.batches.extend(handed.into_values());
        if refused {
            tokio::time::sleep(RETRY).await;
        }
        gathered
    }

    /// Takes what waits of what confirms have leased to this process, a batch for each
    /// subscription in turn.
    async fn take_handed(&mut self, bytes: &mut usize) -> BTreeMap<String, Vec<Loaded>> {
        let rabbit = Arc::clone(&self.rabbit);
        let (mut sent, mut unsent) = (Vec::new(), Vec::new());
        // Half of what there is, so that what has to be claimed has its turn, too.
        let mut handed_bytes = *bytes / 2;
        for _ in 0..rabbit.handoffs.turns().min(CHANNELS / 2) {
            if handed_bytes == 0 {
                break;
            }
            let Some((subscription, mut leased)) = rabbit.handoffs.take(BATCH, handed_bytes) else {
                break;
            };
            let mut room = 0;
            if rabbit.queues.is_open(&subscription) {
                room = rabbit.queues.reserve(&subscription, leased.len());
            }
            unsent.extend(leased.split_off(room));
            let taken: usize = leased.iter().map(|one| one.handed.body_bytes).sum();
            handed_bytes = handed_bytes.saturating_sub(taken);
            *bytes = bytes.saturating_sub(taken);
            sent.extend(leased);
        }
        rabbit.give_up(unsent).await;
        if sent.is_empty() {
            return BTreeMap::new();
        }
        let handed = sent.iter().map(|one| one.handed.clone()).collect();
        let loaded = rabbit.store.load(handed).await;
        let Some(loaded) = self.trouble.note(loaded) else {
            for one in &sent {
                rabbit.queues.landed(&one.handed.subscription, 1, 0);
            }
            rabbit.give_up(sent).await;
            return BTreeMap::new();
        };
        let mut batches: BTreeMap<String, Vec<Loaded>> = BTreeMap::new();
        for (one, claim) in sent.into_iter().zip(loaded) {
            let subscription = one.handed.subscription;
            let Some(claim) = claim else {
                // It was reported, and is found again when its lease has ended.
                rabbit.queues.landed(&subscription, 1, 0);
                continue;
            };
            batches
                .entry(subscription.clone())
                .or_default()
                .push(Loaded {
                    subscription,
                    claim,
                    claimed_at: one.leased_at,
                });
        }
        batches
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

    /// Sends each batch off on a channel of its own.
    async fn take_off(&mut self, batches: Vec<Vec<Loaded>>) -> Vec<Flying> {
        let mut flying = Vec::with_capacity(batches.len());
        for loaded in batches {
            let Some(carrier) = self.carrier().await else {
                self.rabbit.give_back(loaded).await;
                continue;
            };
            let rabbit = &self.rabbit;
            let flight = Flight::start(rabbit, &rabbit.publishing, carrier, loaded).await;
            flying.push(Flying {
                tag: flight.tag(),
                landing: rabbit.tasks.spawn(flight.land()),
            });
        }
        flying
    }

    /// Follows flights until they land; those that take long are left alone with their queues,
    /// and it goes on with the others.
    async fn follow(&mut self, flying: Vec<Flying>, gathered: &mut Gathered) {
        let followed = flying.into_iter().map(|one| one.follow(&self.rabbit));
        let landed = join_all(followed).await;
        let late = landed.iter().any(Option::is_none);
        let carriers = landed.into_iter().flatten();
        self.carriers
            .extend(carriers.filter_map(|landed| landed.carrier));
        if late {
            let open = |loaded: &Vec<Loaded>| {
                let first = loaded.first();
                first.is_some_and(|loaded| self.rabbit.queues.is_open(&loaded.subscription))
            };
            let batches = std::mem::take(&mut gathered.batches);
            let (open, held_up) = batches.into_iter().partition(open);
            gathered.batches = open;
            let held_up: Vec<Vec<Loaded>> = held_up;
            self.rabbit
                .give_back(held_up.into_iter().flatten().collect())
                .await;
        }
    }
}

/// A flight that is followed.
struct Flying {
    tag: Tag,
    landing: JoinHandle<Landed>,
}

impl Flying {
    /// How it landed; `None` if it was left alone.
    async fn follow(mut self, rabbit: &RabbitMq) -> Option<Landed> {
        loop {
            match timeout(2 * PATIENCE, &mut self.landing).await {
                Ok(landed) => {
                    let nothing = Landed {
                        carrier: None,
                        trouble: None,
                    };
                    return Some(landed.unwrap_or(nothing));
                }
                // Nobody is served then, and the flight goes on when it is over.
                Err(_) if rabbit.publishing.is_blocked() => {}
                Err(_) => {
                    self.tag.leave_alone(&rabbit.queues);
                    return None;
                }
            }
        }
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
}
