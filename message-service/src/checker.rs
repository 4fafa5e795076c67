//! Finds out what became of prepared messages: prepared too long → ask the producer → confirm
//! or cancel.
//!
//! Each producer has a lane of its own, so one that is down or slow costs the others nothing.
//! A lane that gets no answer asks with one message, more and more rarely, and leaves the
//! producer's other messages alone until it answers; the first answer brings it back to full
//! speed. Only answered checks count, and checking never ends without a verdict.
//!
//! What to write is decided in `plan`, when to ask in `lane`.

mod lane;
mod plan;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::pass::{self, Pace};
use crate::producer::StatusSource;
use crate::store::{self, Store};
use crate::topology::Snapshot;
use lane::Lane;

/// When producers are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a message that is being asked about is kept from being asked about again;
    /// longer than a call may take. It saves work and is not needed for correctness.
    pub lease: Duration,
    /// How often a lane looks for messages whose check is due, if nobody tells it.
    pub poll: Duration,
    /// The wait after the first call without an answer; doubles with every further one.
    pub first_retry: Duration,
    /// The longest wait between two probes of a producer that does not answer.
    pub slowest_retry: Duration,
    /// How often lanes are compared with the topology.
    pub lanes_period: Duration,
    /// What the jitter of polls and probes comes from.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(30),
            poll: pass::QUIET,
            first_retry: Duration::from_millis(500),
            slowest_retry: Duration::from_secs(30),
            lanes_period: Duration::from_secs(1),
            seed: 0,
        }
    }
}

/// Is told when a producer's status endpoint answers, and when it stops answering.
pub type OnReachable = Arc<dyn Fn(&str, bool) + Send + Sync>;

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Messages that were asked about.
    pub asked: usize,
    /// Messages whose question was answered, with a verdict or without.
    pub answered: usize,
    /// Results that were written.
    pub settled: usize,
    /// Lanes whose producer did not answer.
    pub unreachable: usize,
}

/// Checks the messages of all producers that have a status endpoint.
pub struct Checker {
    shared: Arc<Shared>,
    lanes: Mutex<BTreeMap<String, Arc<Lane>>>,
}

/// What all lanes use.
struct Shared {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    source: Arc<dyn StatusSource>,
    topology: Arc<Snapshot>,
    on_reachable: OnReachable,
    settings: Settings,
}

impl Checker {
    /// Checks what is in the store, asks the source, and tells the broker what became due.
    pub fn new(
        store: Arc<dyn Store>,
        broker: Arc<dyn Broker>,
        source: Arc<dyn StatusSource>,
        topology: Arc<Snapshot>,
        on_reachable: OnReachable,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                store,
                broker,
                source,
                topology,
                on_reachable,
                settings,
            }),
            lanes: Mutex::default(),
        })
    }

    /// Checks until stopped. Lanes come and go with the topology.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut running: BTreeMap<String, CancellationToken> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        loop {
            let lanes = self.lanes();
            running.retain(|producer, stop| {
                let stays = lanes.contains_key(producer);
                if !stays {
                    stop.cancel();
                }
                stays
            });
            for (producer, lane) in lanes {
                running.entry(producer).or_insert_with(|| {
                    let stop = stop.child_token();
                    tasks.spawn(run_lane(lane, stop.clone()));
                    stop
                });
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(self.shared.settings.lanes_period) => {}
            }
            while let Some(ended) = tasks.try_join_next() {
                if let Err(error) = ended {
                    // A defect in one lane must not end the checks of a producer for good:
                    // every lane that was stopped by it is started again in the next round.
                    tracing::error!(%error, "a lane of the checker ended: {error}");
                    running.values().for_each(CancellationToken::cancel);
                    running.clear();
                }
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Runs every lane once, one page each, in the order of the producers' names. Probes do
    /// not wait for their time.
    pub async fn run_once(&self) -> Result<Report, store::Error> {
        let mut report = Report::default();
        for lane in self.lanes().values() {
            let page = lane.run_once().await?;
            report.asked += page.asked;
            report.answered += page.answered;
            report.settled += page.settled;
            report.unreachable += usize::from(page.retry_after.is_some());
        }
        Ok(report)
    }

    /// How many messages are being asked about.
    pub fn holds(&self) -> u64 {
        let lanes = self.lock();
        let asking = |lane: &Arc<Lane>| lane.asking.load(Ordering::Relaxed) as u64;
        lanes.values().map(asking).sum()
    }

    /// Looks for due checks of this producer now rather than with the next poll. A producer
    /// that does not answer is not asked sooner.
    pub fn due(&self, producer: &str) {
        if let Some(lane) = self.lock().get(producer) {
            lane.signal.notify_one();
        }
    }

    /// One lane for each producer that can be asked, as the topology is now.
    fn lanes(&self) -> BTreeMap<String, Arc<Lane>> {
        let topology = self.shared.topology.get();
        let mut lanes = self.lock();
        lanes.retain(|producer, _| {
            let stays = has_endpoint(&topology, producer);
            if !stays {
                // Nobody is asked any more, so nobody is missed.
                (self.shared.on_reachable)(producer, true);
            }
            stays
        });
        for producer in topology.producers.keys() {
            if has_endpoint(&topology, producer) && !lanes.contains_key(producer) {
                let lane = Lane::new(producer.clone(), Arc::clone(&self.shared));
                lanes.insert(producer.clone(), Arc::new(lane));
            }
        }
        lanes.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Lane>>> {
        // A panic while the lock is held leaves a map of whole lanes.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_endpoint(topology: &crate::topology::Topology, producer: &str) -> bool {
    topology
        .producers
        .get(producer)
        .is_some_and(|producer| producer.status_endpoint.is_some())
}

async fn run_lane(lane: Arc<Lane>, stop: CancellationToken) {
    let settings = &lane.shared.settings;
    let pace = Pace::when_told(settings.poll, settings.first_retry, lane.seed());
    let name = format!("checker of producer {}", lane.producer);
    pass::run(&name, pace, &lane.signal, &stop, || async {
        lane.run_once().await.map(|page| page.next())
    })
    .await;
}

#[cfg(test)]
mod tests;
