//! RabbitMQ as the broker: what is due goes straight to its subscription's quorum queue.
//!
//! One send is one delivery in one queue: default exchange, mandatory, and its publisher confirm
//! speaks for that delivery alone. At most `max_in_queue` messages wait in RabbitMQ for a
//! subscription; the rest stays PENDING in the store, so a consumer that is down fills our
//! table and not RabbitMQ's disk.
//!
//! In reading order: `names`, `wire` (the contract) · `link` (a supervised connection) ·
//! `publish` (one batch, and what is known after it) · `queues` (what is known of each queue) ·
//! `flight` (a batch with its leases) · `air` (which may start) · `lane` (fresh, drain) · `probation` (what must go alone)
//! · `sent` · `declare`, `look` (the queues themselves) · `answers` · `publisher` (for benchmarks).

mod air;
mod answers;
mod declare;
mod error;
mod flight;
mod lane;
mod link;
mod look;
mod names;
mod probation;
mod publish;
mod publisher;
mod queues;
mod sent;
mod wire;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use handfast_fail_points::{Point, hit};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

pub use link::Addresses;
pub use names::{Names, RESERVED};
pub use publisher::Publisher;

use super::handoff::Handoffs;
use super::{AnswerSink, AnswerState, Broker, BrokerState, Permit, QueueState};
use crate::clock::Clock;
use crate::message::{MessageId, Timestamp};
use crate::pass::{self, Trouble};
use crate::store::{Due, Handed, Heard, Overdue, Store};
use crate::topology::Snapshot;
use declare::Declared;
use link::{Link, LinkState, Opened};
use queues::{Pace, Queues};
use sent::Unmarked;

/// SENT is written this often.
const SENT_FLUSH: Duration = Duration::from_secs(1);
/// SENT is written at once if this many wait.
const SENT_WAITING: usize = 20_000;
/// A handler may take less than `resend_after`, so a consumer that is connected to an empty queue
/// and has answered nothing for twice as long holds nothing.
const SILENT_CONSUMER: u32 = 2;
/// But one that stands still is only noticed when its heartbeats are missing, after 20 s, and then
/// everything that it held is back in its queue.
const LEAST_SILENCE: Duration = Duration::from_secs(30);
/// How long the end waits for what is under way beyond its publisher confirms.
const LAST: Duration = Duration::from_secs(5);

/// How RabbitMQ is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where it is.
    pub addresses: Addresses,
    /// What every name begins with.
    pub deployment: String,
    /// Whose names they are: the identity of the store.
    pub store: Uuid,
    /// How long a publisher confirm may take; below `lease`.
    pub publisher_confirm: Duration,
    /// How long a claim lasts until SENT is written.
    pub lease: Duration,
    /// When the silence of a delivery that is SENT is looked at.
    pub resend_after: Duration,
    /// What jitter comes from.
    pub seed: u64,
}

/// Why a start is refused. Each is one line with the way out.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another store uses the same names.
    #[error(
        "RabbitMQ's names of deployment `{deployment}` carry another store's mark ({why}); choose \
         another [server] deployment, or delete the queue {mark} if that store is gone"
    )]
    OtherMark {
        /// The deployment.
        deployment: String,
        /// The queue that carries the mark.
        mark: String,
        /// What RabbitMQ said.
        why: String,
    },
    /// A queue of ours exists with other arguments.
    #[error(
        "queue {queue} was declared with other arguments: {why}; arguments cannot be changed, so \
         empty and delete the queue, and start again"
    )]
    OtherArguments {
        /// Which queue.
        queue: String,
        /// What RabbitMQ said, with the argument's name.
        why: String,
    },
}

/// The broker on RabbitMQ.
pub struct RabbitMq {
    store: Arc<dyn Store>,
    topology: Arc<Snapshot>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    names: Names,
    queues: Queues,
    /// What confirms have leased to this process.
    handoffs: Arc<Handoffs>,
    unmarked: Unmarked,
    incidents: answers::Incidents,
    /// Answers that wait in RabbitMQ, as last seen.
    answers_waiting: AtomicU64,
    answers_trouble: answers::Standstill,
    /// True once RabbitMQ's names are known to be this store's. Before, nothing is sent and
    /// nobody's answers are taken.
    ours: watch::Sender<bool>,
    /// Subscriptions whose queues are to go.
    removed: Mutex<Vec<String>>,
    /// For healthy queues.
    publishing: Arc<Link>,
    /// For queues on probation, and suspects.
    probation: Arc<Link>,
    /// For declaring and looking.
    looking: Arc<Link>,
    /// For answers.
    consuming: Arc<Link>,
    /// Something is due, for each lane.
    signals: [Notify; 2],
    /// Something has to be sent alone.
    alone: Notify,
    flights: AtomicU64,
    /// Everything that claims and sends.
    tasks: TaskTracker,
    /// Everything that keeps the connections, and the answers.
    services: TaskTracker,
    /// Nothing is claimed any more.
    draining: CancellationToken,
    /// Nothing is taken any more either.
    stopping: CancellationToken,
    /// The connections close.
    closing: CancellationToken,
}

impl RabbitMq {
    /// Joins the parts. Nothing runs yet.
    pub fn new(
        store: Arc<dyn Store>,
        topology: Arc<Snapshot>,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Arc<Self> {
        let link = |purpose| Link::new(purpose, settings.addresses.clone());
        Arc::new(Self {
            store,
            topology,
            clock,
            names: Names::new(&settings.deployment),
            queues: Queues::default(),
            handoffs: Arc::default(),
            unmarked: Unmarked::default(),
            incidents: answers::Incidents::default(),
            answers_waiting: AtomicU64::new(0),
            answers_trouble: answers::Standstill::default(),
            ours: watch::Sender::new(false),
            removed: Mutex::default(),
            publishing: link("publish"),
            probation: link("probation"),
            looking: link("look"),
            consuming: link("answers"),
            signals: [Notify::new(), Notify::new()],
            alone: Notify::new(),
            flights: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            services: TaskTracker::new(),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            closing: CancellationToken::new(),
            settings,
        })
    }

    /// Connects, and refuses names that are another's and queues with other arguments. A
    /// RabbitMQ that does not answer within `at_most` is no reason to refuse: what can be kept
    /// is kept, and all of this is done when it is there.
    ///
    /// `removed` are subscriptions that were removed, at whatever time: a start that was cut off
    /// leaves their queues.
    pub async fn connect(
        self: &Arc<Self>,
        removed: &[String],
        at_most: Duration,
    ) -> Result<(), Refused> {
        let links = [
            &self.publishing,
            &self.probation,
            &self.looking,
            &self.consuming,
        ];
        for (number, link) in links.into_iter().enumerate() {
            let seed = self.settings.seed.wrapping_add(number as u64);
            let link = Arc::clone(link);
            self.services.spawn(link.run(seed, self.closing.clone()));
        }
        self.queues.follow(&self.topology.get());
        self.to_remove(removed.to_vec());
        let checked = tokio::time::timeout(at_most, self.check()).await;
        if let Ok(Err(refused)) = checked {
            self.close().await;
            return Err(refused);
        }
        if checked.is_err() {
            tracing::warn!(
                addresses = self.settings.addresses.shown(),
                "RabbitMQ does not answer yet; messages are kept until it does"
            );
        }
        Ok(())
    }

    async fn check(&self) -> Result<(), Refused> {
        let opened = self.looking.ready().await;
        match self.mark(&opened).await {
            Ok(marked) => marked?,
            Err(error) => {
                tracing::warn!(%error, "cannot mark RabbitMQ's names as ours yet: {error}");
            }
        }
        let topology = self.topology.get();
        let queues = topology.subscriptions.keys();
        let queues = queues.map(|name| self.names.queue(name));
        for queue in queues {
            if let Ok(Declared::Differs(why)) = declare::queue(&opened, &queue).await {
                return Err(Refused::OtherArguments { queue, why });
            }
        }
        let queue = self.names.acknowledge();
        if let Ok(Declared::Differs(why)) = declare::acknowledge(&opened, &queue).await {
            return Err(Refused::OtherArguments { queue, why });
        }
        Ok(())
    }

    /// Marks the names as this store's, or finds whose they are.
    async fn mark(&self, opened: &Opened) -> Result<Result<(), Refused>, error::Error> {
        let mark = self.names.mark();
        Ok(
            match declare::mark(opened, &mark, self.settings.store).await? {
                Ok(()) => {
                    self.ours.send_replace(true);
                    Ok(())
                }
                Err(why) => Err(Refused::OtherMark {
                    deployment: self.settings.deployment.clone(),
                    mark,
                    why,
                }),
            },
        )
    }

    fn to_remove(&self, names: Vec<String>) {
        self.removed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(names);
    }

    fn take_removed(&self) -> Vec<String> {
        std::mem::take(&mut *self.removed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Begins to send, and to take answers.
    pub fn start(self: &Arc<Self>, sink: Arc<dyn AnswerSink>) {
        for (name, pace) in [("fresh lane", Pace::Fresh), ("drain lane", Pace::Drain)] {
            let lane = move |rabbit| lane::Running::new(rabbit, pace).run();
            self.keep(name, &self.tasks, &self.draining, lane);
        }
        self.keep(
            "lane of suspects",
            &self.tasks,
            &self.draining,
            Self::send_alone,
        );
        self.keep("look at queues", &self.tasks, &self.draining, Self::look);
        self.keep(
            "marking SENT",
            &self.services,
            &self.stopping,
            Self::mark_sent,
        );
        let answers = move |rabbit| answers::run(rabbit, Arc::clone(&sink));
        self.keep("taking answers", &self.services, &self.stopping, answers);
    }

    /// Keeps something running until `stop`.
    fn keep<F>(
        self: &Arc<Self>,
        name: &'static str,
        tasks: &TaskTracker,
        stop: &CancellationToken,
        what: impl Fn(Arc<Self>) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let rabbit = Arc::clone(self);
        let pass = move |_| what(Arc::clone(&rabbit));
        tasks.spawn(pass::kept(name, stop.clone(), pass));
    }

    /// The service begins to stop: nothing is claimed any more. Answers go on.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Stops: what is under way gets its publisher confirms, SENT is written, what was not
    /// tried is given back, and the connections close. Bounded by the time of a publisher
    /// confirm and a few seconds.
    pub async fn shutdown(&self) {
        self.drain();
        self.tasks.close();
        let landing = self.settings.publisher_confirm + LAST;
        if tokio::time::timeout(landing, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("some messages are still under way to RabbitMQ; they are sent again");
        }
        // Whatever held up the lane that does this.
        let waiting = self.handoffs.close();
        let _ = tokio::time::timeout(LAST, self.give_up(waiting)).await;
        self.close().await;
    }

    async fn close(&self) {
        self.draining.cancel();
        self.stopping.cancel();
        if let Err(error) = self.write_sent().await {
            tracing::warn!(%error, "cannot mark deliveries SENT; they are sent again: {error}");
        }
        self.closing.cancel();
        self.services.close();
        // Connections that do not answer end with the process.
        let _ = tokio::time::timeout(LAST, self.services.wait()).await;
    }

    async fn mark_sent(self: Arc<Self>) {
        let mut trouble = Trouble::new("marking deliveries SENT");
        let mut waited = Duration::ZERO;
        let step = SENT_FLUSH / 4;
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(step) => {}
            }
            waited += step;
            if waited >= SENT_FLUSH || self.unmarked.len() >= SENT_WAITING {
                waited = Duration::ZERO;
                trouble.note(self.write_sent().await);
            }
        }
    }

    async fn write_sent(&self) -> Result<usize, crate::store::Error> {
        let resend_after = self.settings.resend_after;
        self.unmarked.write(self.store.as_ref(), resend_after).await
    }

    fn wake(&self) {
        for signal in &self.signals {
            signal.notify_one();
        }
        self.alone.notify_one();
    }

    fn answers_waiting(&self, number: u64) {
        self.answers_waiting.store(number, Ordering::Relaxed);
    }
}

#[async_trait]
impl Broker for RabbitMq {
    fn due(&self, topics: &BTreeSet<String>) {
        self.queues.signal(topics);
        for signal in &self.signals {
            signal.notify_one();
        }
    }

    fn look_at(&self, due: &Due) {
        if self.queues.look_at(due) {
            self.wake();
        }
    }

    fn permit(&self, messages: usize) -> Permit {
        let now = self.clock.monotonic();
        if !self.publishing.is_up() || self.draining.is_cancelled() {
            return Permit::none_at(now);
        }
        let rooms = self.queues.rooms();
        (self.handoffs).permit(messages, self.settings.lease, now, rooms)
    }

    async fn hand_over(&self, permit: Permit, handed: Vec<Handed>) {
        let too_late = self.handoffs.keep(&permit, handed);
        drop(permit);
        hit(Point::RELAY_HANDED);
        self.give_up(too_late).await;
        self.signals[Pace::Fresh as usize].notify_one();
    }

    fn answered(&self, subscription: &str, ids: &[MessageId]) {
        self.unmarked.answered(subscription, ids);
        let now = self.clock.monotonic();
        if self.queues.answered(subscription, ids.len(), now) {
            self.signals[Pace::Drain as usize].notify_one();
        }
    }

    fn heard(&self, heard: &Heard) {
        self.queues.heard(heard, self.clock.monotonic());
    }

    fn holds(&self) -> u64 {
        let waiting = self.handoffs.waiting() + self.unmarked.len();
        self.queues.in_flight() + waiting as u64
    }

    async fn is_gone(&self, subscription: &str, overdue: &[Overdue]) -> Vec<bool> {
        // An answer that still waits in RabbitMQ is no silence.
        let waiting = self.answers_waiting.load(Ordering::Relaxed) > 0;
        let silent = self.looking.is_up() && !waiting && !self.answers_trouble.is_present();
        let (now, monotonic) = (self.store.now(), self.clock.monotonic());
        let silence = (self.settings.resend_after * SILENT_CONSUMER).max(LEAST_SILENCE);
        let gone = |sent_at: Timestamp| {
            let ago = now.since(sent_at);
            silent && (self.queues).does_not_hold(subscription, ago, silence, monotonic)
        };
        overdue
            .iter()
            .map(|overdue| gone(overdue.sent_at))
            .collect()
    }

    fn consumers(&self, subscription: &str) -> Option<u32> {
        self.queues.consumers(subscription)
    }

    fn state(&self) -> BrokerState {
        let links = [&self.publishing, &self.looking, &self.consuming];
        let states = links.map(|link| link.state());
        let blocked = states.iter().find_map(|state| match state {
            LinkState::Blocked(why) => Some(BrokerState::Blocked(why.clone())),
            LinkState::Up | LinkState::Down(_) => None,
        });
        let down = states.iter().find_map(|state| match state {
            LinkState::Down(why) => Some(BrokerState::Down(why.clone())),
            LinkState::Up | LinkState::Blocked(_) => None,
        });
        down.or(blocked).unwrap_or(BrokerState::Up)
    }

    fn queue(&self, subscription: &str) -> Option<QueueState> {
        self.queues.show(subscription).map(|shown| QueueState {
            consumers: shown.consumers,
            waiting: shown.waiting,
            trouble: shown.trouble,
        })
    }

    fn answers(&self) -> AnswerState {
        let [unreadable, unknown, foreign] = self.incidents.counts();
        AnswerState {
            trouble: self.answers_trouble.shown(),
            unreadable,
            unknown,
            foreign,
        }
    }
}

impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
