//! Says once a second that this process is there, what it holds and which answers it took, and
//! hears the same of the others.
//!
//! Nobody leads, and nothing may only be done by who is there: this is for people, and for
//! noticing sooner that something was lost, whoever took the answers that show it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::answered::Answered;
use crate::broker::Broker;
use crate::checker::Checker;
use crate::message::Timestamp;
use crate::pass::{self, Next, Pace};
use crate::recovery::Recovery;
use crate::refresh::Refresh;
use crate::store::{self, Store};
use crate::topology::Snapshot;

/// How often.
const PERIOD: Duration = Duration::from_secs(1);

/// Who this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Another one after every start.
    pub id: Uuid,
    /// Of the program.
    pub version: String,
    /// Where it serves.
    pub address: String,
    /// What the jitter of the period comes from.
    pub seed: u64,
}

type Told = HashMap<String, (u64, Option<Timestamp>)>;

/// Speaks for this process.
pub struct Presence {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    checker: Arc<Checker>,
    answered: Arc<Answered>,
    topology: Arc<Snapshot>,
    refresh: Arc<Refresh>,
    recovery: Arc<Recovery>,
    identity: Identity,
    /// By subscription, what the others know: how many arrivals of answers, and the mark.
    told: Mutex<Told>,
}

impl Presence {
    /// Nothing is said yet.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is told something that was heard"
    )]
    pub fn new(
        store: Arc<dyn Store>,
        broker: Arc<dyn Broker>,
        checker: Arc<Checker>,
        answered: Arc<Answered>,
        topology: Arc<Snapshot>,
        refresh: Arc<Refresh>,
        recovery: Arc<Recovery>,
        identity: Identity,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            broker,
            checker,
            answered,
            topology,
            refresh,
            recovery,
            identity,
            told: Mutex::default(),
        })
    }

    /// Speaks and listens until stopped.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let pace = Pace::new(PERIOD, self.identity.seed);
        pass::run("presence", pace, &Notify::new(), &stop, || async {
            self.run_once().await.map(|()| Next::Signal)
        })
        .await;
    }

    /// Speaks and listens once.
    pub async fn run_once(&self) -> Result<(), store::Error> {
        let all = self.answered.all();
        let mut answered = Vec::new();
        let told = self.told().clone();
        for (name, arrivals, through) in &all {
            if *arrivals > 0 && told.get(name) != Some(&(*arrivals, *through)) {
                answered.push((name.clone(), *through));
            }
        }
        let heard = self
            .store
            .announce(store::Presence {
                id: self.identity.id,
                version: self.identity.version.clone(),
                address: self.identity.address.clone(),
                deliveries: self.broker.holds(),
                checks: self.checker.holds(),
                answered,
            })
            .await
            .inspect_err(|_| self.recovery.distrust_silence())?;
        *self.told() = all
            .into_iter()
            .map(|(name, arrivals, through)| (name, (arrivals, through)))
            .collect();
        let (topology, now) = (self.topology.get(), self.store.now());
        for (name, through, _) in &heard.answered {
            if let Some(through) = through
                && topology.subscriptions.contains_key(name)
            {
                self.answered.heard(name, *through, now);
            }
        }
        self.broker.heard(&heard);
        self.refresh.heard(heard.topology_version);
        Ok(())
    }

    /// Says good-bye. Who cannot is forgotten after a while.
    pub async fn leave(&self) {
        if let Err(error) = self.store.leave(self.identity.id).await {
            tracing::debug!(%error, "cannot say that this replica ends");
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        // A panic while the lock is held leaves a whole map.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Presence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Presence")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}
