//! A batch with its leases: from the claim to what the store is told about it.
//!
//! A flight runs in a task of its own, because one queue that does not confirm must not hold up
//! the others: whoever started it waits for a moment and then goes on with another channel,
//! while the flight waits on alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use handfast_fail_points::{Point, hit};
use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::time::timeout;
use uuid::Uuid;

use super::RabbitMq;
use super::error::Error;
use super::link::{Link, Opened, STEP};
use super::publish::{Batch, Fate, Outgoing, Progress};
use super::queues::{Health, Queues};
use super::wire;
use crate::broker::handoff::Leased;
use crate::message::MessageId;
use crate::store::{DeliveryClaim, NotSent, Sent, Unsent};

/// How long nothing may happen before it is looked at why.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);
/// The wait before what a queue refused is due again. Its queue is on probation meanwhile and
/// is tried with single messages, so this is no poll.
const REFUSED_WAIT: Duration = Duration::from_secs(1);
/// Leases that are given back in one write.
const SLICE: usize = 500;
/// How often a return is tried before it is left to its lease.
const RETURN_TRIES: u32 = 3;

/// A claimed delivery.
pub(super) struct Loaded {
    pub(super) subscription: String,
    pub(super) claim: DeliveryClaim,
    /// Monotonic time at which the claim was asked for; its lease is at least that old.
    pub(super) claimed_at: Duration,
}

/// What is kept of a delivery while it is under way.
struct Ticket {
    subscription: String,
    sent: Sent,
    leased_at: Duration,
    /// Others know that it is sent.
    settled: bool,
}

/// How a flight ended.
pub(super) struct Landed {
    /// The channel, if it can carry another batch.
    pub(super) carrier: Option<Carrier>,
    /// Why something of it is not in its queue, though it is no suspect.
    pub(super) trouble: Option<String>,
}

/// A channel in confirm mode that carries one batch at a time.
pub(super) struct Carrier {
    channel: Channel,
    opened: Arc<Opened>,
}

impl Carrier {
    pub(super) async fn open(opened: Arc<Opened>) -> Result<Self, Error> {
        let channel = opened.channel().await?;
        match timeout(
            STEP,
            channel.confirm_select(ConfirmSelectOptions::default()),
        )
        .await
        {
            Ok(done) => done?,
            Err(_) => return Err(Error::timed_out("ask for publisher confirms", STEP)),
        }
        Ok(Self { channel, opened })
    }

    pub(super) fn is_usable(&self) -> bool {
        self.channel.status().connected() && self.opened.is_connected()
    }
}

/// What others know of a flight.
#[derive(Clone)]
pub(super) struct Tag {
    number: u64,
    subscription: String,
    /// It has taken off: from then on it waits for RabbitMQ and for nobody else.
    started: Arc<AtomicBool>,
    landed: Arc<AtomicBool>,
}

/// Dropped when a flight is over, however it ended.
pub(super) struct Over {
    rabbit: Arc<RabbitMq>,
    tag: Tag,
}

impl Drop for Over {
    /// Otherwise its queue would be left alone for ever.
    fn drop(&mut self) {
        self.tag.landed.store(true, Ordering::SeqCst);
        self.tag.open_again(&self.rabbit.queues);
    }
}

impl Tag {
    /// To be kept for as long as the flight lasts.
    pub(super) fn until_over(&self, rabbit: &Arc<RabbitMq>) -> Over {
        Over {
            rabbit: Arc::clone(rabbit),
            tag: self.clone(),
        }
    }

    pub(super) fn has_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Sends nothing more to the queue of this flight until it has landed. If several to the same
    /// queue are late, the first of them stands for all.
    pub(super) fn leave_alone(&self, queues: &Queues) {
        let open = |health: &Health| *health == Health::Open;
        queues.turn(&self.subscription, open, Health::Slow(self.number));
        // It may have landed in between, and then nobody else would open them again.
        if self.landed.load(Ordering::SeqCst) {
            self.open_again(queues);
        }
    }

    fn open_again(&self, queues: &Queues) {
        let slow = |health: &Health| *health == Health::Slow(self.number);
        queues.turn(&self.subscription, slow, Health::Open);
    }
}

/// A batch under way.
pub(super) struct Flight {
    rabbit: Arc<RabbitMq>,
    link: Arc<Link>,
    tag: Tag,
    tickets: Vec<Ticket>,
    batch: Batch,
    carrier: Carrier,
}

impl Flight {
    /// Takes off with what has enough of its lease left. The rest is given back.
    pub(super) async fn start(
        rabbit: &Arc<RabbitMq>,
        link: &Arc<Link>,
        tag: Tag,
        carrier: Carrier,
        loaded: Vec<Loaded>,
    ) -> Self {
        let (good, late) = rabbit.split_by_lease(loaded);
        rabbit.give_back(late).await;
        let mut tickets = Vec::with_capacity(good.len());
        let mut outgoing = Vec::with_capacity(good.len());
        for loaded in good {
            let claim = loaded.claim;
            tickets.push(Ticket {
                sent: Sent {
                    id: claim.id,
                    token: claim.token,
                },
                leased_at: loaded.claimed_at,
                settled: false,
                subscription: loaded.subscription,
            });
            let name = &tickets[tickets.len() - 1].subscription;
            outgoing.push(Outgoing {
                queue: rabbit.names.queue(name),
                properties: wire::properties(name, &claim),
                payload: claim.payload,
            });
        }
        tag.started.store(true, Ordering::SeqCst);
        Self {
            tag,
            rabbit: Arc::clone(rabbit),
            link: Arc::clone(link),
            batch: Batch::start(&carrier.channel, outgoing),
            tickets,
            carrier,
        }
    }

    /// Waits for every confirm and tells the store.
    pub(super) async fn land(mut self) -> Landed {
        let limit = self.rabbit.settings.publisher_confirm;
        let mut waited = Duration::ZERO;
        let why = loop {
            match self.batch.progress(PATIENCE).await {
                Progress::Complete => break String::new(),
                // A narrow way takes as long as it takes.
                Progress::Moving => waited = Duration::ZERO,
                Progress::Quiet => waited += PATIENCE,
            }
            // As long as it is under way, nobody else is to send it.
            self.renew().await;
            if self.link.is_blocked() {
                // RabbitMQ has not even read it, so nothing times out.
                waited = Duration::ZERO;
                continue;
            }
            self.settle_what_is_sent();
            if waited >= limit {
                break format!("no publisher confirm within {} s", limit.as_secs_f64());
            }
        };
        hit(Point::RELAY_CONFIRMED);
        let Self {
            rabbit,
            tag,
            tickets,
            batch,
            carrier,
            ..
        } = self;
        let fates = batch.fates(&why);
        let timed_out = !why.is_empty();
        // Before anything is closed: a connection that is there is not the trouble.
        let mut alive = carrier.opened.is_connected();
        // RabbitMQ remembers for a channel that a queue was full, also when its limit is lifted.
        let rejected = fates.iter().any(|fate| matches!(fate, Fate::Nacked));
        if timed_out || rejected {
            // Closed, so that what it still holds is not sent after it was given back. At a queue
            // that stands still the channel cannot even close; it is left behind then, since the
            // connection is needed by everybody else. What it holds is for that queue alone.
            let close = carrier.channel.close(200, "of no more use".into());
            let _ = timeout(PATIENCE, close).await;
        } else {
            alive = carrier.opened.is_connected();
        }
        let trouble = rabbit
            .landed(&tag, tickets_and(tickets, fates), alive)
            .await;
        Landed {
            carrier: (!timed_out && carrier.is_usable()).then_some(carrier),
            trouble,
        }
    }

    /// Those that are confirmed need not wait for those that are not.
    fn settle_what_is_sent(&mut self) {
        let mut sent: BTreeMap<String, Vec<Sent>> = BTreeMap::new();
        for index in self.batch.sent_so_far() {
            let ticket = &mut self.tickets[index];
            if std::mem::replace(&mut ticket.settled, true) {
                continue;
            }
            sent.entry(ticket.subscription.clone())
                .or_default()
                .push(ticket.sent);
        }
        for (subscription, sent) in sent {
            self.rabbit.unmarked.add(&subscription, sent);
        }
    }

    async fn renew(&mut self) {
        let now = self.rabbit.clock.monotonic();
        let lease = self.rabbit.settings.lease;
        let mut old: BTreeMap<String, Vec<Sent>> = BTreeMap::new();
        for ticket in &mut self.tickets {
            if !ticket.settled && now.saturating_sub(ticket.leased_at) >= lease / 3 {
                ticket.leased_at = now;
                old.entry(ticket.subscription.clone())
                    .or_default()
                    .push(ticket.sent);
            }
        }
        for (subscription, sent) in old {
            // If the store is away, the lease ends, and what is sent twice is absorbed.
            let _ = self.rabbit.store.renew(&subscription, sent, lease).await;
        }
    }
}

fn tickets_and(tickets: Vec<Ticket>, fates: Vec<Fate>) -> BTreeMap<String, Vec<(Sent, Fate)>> {
    let mut by: BTreeMap<String, Vec<(Sent, Fate)>> = BTreeMap::new();
    for (ticket, fate) in tickets.into_iter().zip(fates) {
        by.entry(ticket.subscription)
            .or_default()
            .push((ticket.sent, fate));
    }
    by
}

impl RabbitMq {
    /// The tag of a flight to this subscription's queue.
    pub(super) fn tag(&self, subscription: &str) -> Tag {
        Tag {
            number: self.flights.fetch_add(1, Ordering::Relaxed),
            subscription: subscription.to_owned(),
            started: Arc::default(),
            landed: Arc::default(),
        }
    }

    /// Those whose lease lasts long enough to be sent, and the others.
    fn split_by_lease(&self, loaded: Vec<Loaded>) -> (Vec<Loaded>, Vec<Loaded>) {
        let now = self.clock.monotonic();
        let half = self.settings.lease / 2;
        loaded
            .into_iter()
            .partition(|loaded| now.saturating_sub(loaded.claimed_at) <= half)
    }

    /// Gives back what was claimed and not tried.
    pub(super) async fn give_back(&self, loaded: Vec<Loaded>) {
        for one in &loaded {
            self.queues.landed(&one.subscription, 1, 0);
        }
        let leases = loaded.into_iter().map(|one| {
            let Loaded {
                subscription,
                claim,
                ..
            } = one;
            (subscription, claim.id, claim.token)
        });
        self.return_untried(leases).await;
    }

    /// Gives back what a confirm has leased to this process and what is not sent after all. No
    /// room is taken for it.
    pub(super) async fn give_up(&self, leased: Vec<Leased>) {
        let leases = leased.into_iter().map(|one| {
            let handed = one.handed;
            (handed.subscription, handed.id, handed.token)
        });
        self.return_untried(leases).await;
    }

    async fn return_untried(&self, leases: impl Iterator<Item = (String, MessageId, Uuid)>) {
        let mut by: BTreeMap<String, Vec<Unsent>> = BTreeMap::new();
        for (subscription, id, token) in leases {
            by.entry(subscription).or_default().push(Unsent {
                id,
                token,
                why: NotSent::Untried,
            });
        }
        for (subscription, unsent) in by {
            self.return_unsent(&subscription, unsent).await;
        }
    }

    /// Writes down what became of a flight. `alive` is false if the connection is the trouble,
    /// which is then no queue's fault. Says why something is not in its queue.
    async fn landed(
        self: &Arc<Self>,
        tag: &Tag,
        fates: BTreeMap<String, Vec<(Sent, Fate)>>,
        alive: bool,
    ) -> Option<String> {
        let mut first_trouble = None;
        tag.landed.store(true, Ordering::SeqCst);
        for (subscription, fates) in fates {
            let all = fates.len() as u64;
            let mut sent = Vec::new();
            let mut unsent = Vec::new();
            let mut trouble = None;
            for (ticket, fate) in fates {
                let why = match fate {
                    Fate::Sent => {
                        sent.push(ticket);
                        continue;
                    }
                    Fate::Untried => {
                        first_trouble.get_or_insert_with(|| "it was not tried".to_owned());
                        NotSent::Untried
                    }
                    Fate::Suspect(reason) => NotSent::Suspect { reason },
                    Fate::Unknown(reason) if !alive => {
                        first_trouble.get_or_insert(reason);
                        NotSent::Untried
                    }
                    Fate::Returned(said) => refused(
                        &mut trouble,
                        format!("its queue is missing; RabbitMQ returned it: {said}"),
                    ),
                    Fate::Nacked => refused(
                        &mut trouble,
                        "its queue is full or failing; RabbitMQ rejected it".to_owned(),
                    ),
                    Fate::Unknown(reason) => refused(&mut trouble, reason),
                };
                unsent.push(Unsent {
                    id: ticket.id,
                    token: ticket.token,
                    why,
                });
            }
            self.queues.landed(&subscription, all, sent.len() as u64);
            self.unmarked.add(&subscription, sent);
            let is_ours = |health: &Health| match health {
                Health::Open => true,
                Health::Slow(number) => *number == tag.number,
                Health::Undeclared(_) | Health::Probation(_) => false,
            };
            if let Some(reason) = trouble {
                first_trouble.get_or_insert_with(|| reason.clone());
                let probation = Health::Probation(reason.clone());
                if self.queues.turn(&subscription, is_ours, probation) {
                    self.on_probation(&subscription, &reason);
                }
            }
            if unsent
                .iter()
                .any(|unsent| matches!(unsent.why, NotSent::Suspect { .. }))
            {
                tracing::warn!(
                    subscription,
                    "RabbitMQ closed a channel over messages for {subscription}; each of them is \
                     sent alone now"
                );
                self.queues.alone_waits(&subscription);
            }
            self.return_unsent(&subscription, unsent).await;
        }
        tag.open_again(&self.queues);
        first_trouble
    }

    async fn return_unsent(&self, subscription: &str, unsent: Vec<Unsent>) {
        let mut tries = 0;
        let mut slices = unsent.chunks(SLICE).peekable();
        while let Some(slice) = slices.peek()
            // Their leases end by themselves.
            && tries < RETURN_TRIES
        {
            match self.store.return_unsent(subscription, slice.to_vec()).await {
                Ok(_) => drop(slices.next()),
                Err(error) => {
                    tracing::debug!(subscription, %error, "cannot give leases back: {error}");
                    tokio::time::sleep(PATIENCE).await;
                    tries += 1;
                }
            }
        }
    }
}

fn refused(trouble: &mut Option<String>, reason: String) -> NotSent {
    trouble.get_or_insert_with(|| reason.clone());
    NotSent::Refused {
        reason,
        retry_after: REFUSED_WAIT,
    }
}
