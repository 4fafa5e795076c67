//! Looks at what is due, and tells whoever works on it: the broker's lanes, the checker, recovery.
//!
//! One statement a second, however many subscriptions and producers there are, instead of a claim
//! for each of them that finds nothing. What it tells is only a signal. Whoever is told claims what
//! is there, and looks by itself now and then, in case nobody tells.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::checker::Checker;
use crate::pass::{self, Next, Pace};
use crate::recovery::Recovery;
use crate::store::{self, LOOK_AHEAD, Store};
use crate::topology::Snapshot;

/// The shortest wait between two looks, however soon something is due: what is due in between is
/// that much late at most.
const SHORTEST: Duration = Duration::from_millis(50);

/// Looks for this process.
pub struct Look {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    checker: Arc<Checker>,
    recovery: Arc<Recovery>,
    topology: Arc<Snapshot>,
    seed: u64,
}

impl Look {
    /// Nothing is looked at yet.
    pub fn new(
        store: Arc<dyn Store>,
        broker: Arc<dyn Broker>,
        checker: Arc<Checker>,
        recovery: Arc<Recovery>,
        topology: Arc<Snapshot>,
        seed: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            broker,
            checker,
            recovery,
            topology,
            seed,
        })
    }

    /// Looks until stopped.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let pace = Pace::new(LOOK_AHEAD, self.seed);
        pass::run("look", pace, &Notify::new(), &stop, || async {
            let wait = self.run_once().await?.unwrap_or(LOOK_AHEAD);
            let wait = wait.clamp(SHORTEST, LOOK_AHEAD);
            Ok::<_, store::Error>(Next::NotBefore(wait))
        })
        .await;
    }

    /// Looks once, and says how long until something else is due, if that is soon.
    pub async fn run_once(&self) -> Result<Option<Duration>, store::Error> {
        let topology = self.topology.get();
        let subscriptions = topology.subscriptions.keys().cloned().collect();
        let producers = topology.producers.keys().cloned().collect();
        let due = self
            .store
            .due(subscriptions, producers)
            .await
            .inspect_err(|_| self.recovery.distrust_silence())?;
        self.broker.look_at(&due);
        for producer in &due.checks {
            self.checker.due(producer);
        }
        let mut policies = topology.subscriptions.values();
        let ages = policies.any(|subscription| subscription.policy.max_age.is_some());
        if ages || !due.overdue.is_empty() {
            self.recovery.due();
        }
        Ok(due.next_in)
    }
}

impl std::fmt::Debug for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Look").finish_non_exhaustive()
    }
}
