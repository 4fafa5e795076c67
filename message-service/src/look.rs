//! Looks at what is due, and tells whoever works on it: the broker's lanes, the checker, recovery.
//!
//! One statement a second, however many subscriptions and producers there are, instead of a claim
//! for each of them that finds nothing. What it tells is only a signal. Whoever is told claims what
//! is there, and looks by itself now and then, in case nobody tells.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::checker::Checker;
use crate::pass::{self, Next, Pace};
use crate::recovery::Recovery;
use crate::store::{self, Due, LOOK_AHEAD, Store};
use crate::topology::Snapshot;

/// The shortest wait between two looks, however soon something is due: what is due in between is
/// that much late at most.
const SHORTEST: Duration = Duration::from_millis(50);

/// A look that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(2);

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
        let subscriptions: BTreeSet<String> = topology.subscriptions.keys().cloned().collect();
        let producers: BTreeSet<String> = topology.producers.keys().cloned().collect();
        let looking = self.store.due(subscriptions.clone(), producers.clone());
        let looked = tokio::time::timeout(PATIENCE, looking).await;
        if let Ok(Err(store::Error::Unavailable { .. })) = looked {
            self.recovery.distrust_silence();
        }
        let (due, failure) = match looked {
            Ok(Ok(due)) => (due, None),
            // A look that fails must not hold up what would not: each looks by itself.
            Ok(Err(error)) => (Due::all(subscriptions, producers), Some(error)),
            Err(_) => (Due::all(subscriptions, producers), None),
        };
        self.broker.look_at(&due);
        for producer in &due.checks {
            self.checker.due(producer);
        }
        let mut policies = topology.subscriptions.values();
        let ages = policies.any(|subscription| subscription.policy.max_age.is_some());
        if ages || !due.overdue.is_empty() {
            self.recovery.due();
        }
        if let Some(error) = failure {
            return Err(error);
        }
        Ok(due.next_in)
    }
}

impl std::fmt::Debug for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Look").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::answered::Answered;
    use crate::producer::{Question, StatusSource, Unreachable, VerdictKind};
    use crate::world::{Signals, World};
    use crate::{checker, recovery};

    /// Is not asked by a look.
    struct Nobody;

    #[async_trait]
    impl StatusSource for Nobody {
        async fn check(
            &self,
            endpoint: &str,
            _: Vec<Question>,
        ) -> Result<Vec<Option<VerdictKind>>, Unreachable> {
            panic!("{endpoint} is asked");
        }
    }

    async fn scene() -> (World, Arc<Signals>, Arc<Look>) {
        let (world, broker) = (World::new().await, Arc::new(Signals::default()));
        let checker = Checker::new(
            world.store.clone(),
            broker.clone(),
            Arc::new(Nobody),
            world.topology.clone(),
            Arc::new(|_: &str, _| {}),
            checker::Settings::default(),
        );
        let recovery = Recovery::new(
            world.store.clone(),
            broker.clone(),
            Arc::new(Answered::default()),
            world.topology.clone(),
            world.clock.clone(),
            recovery::Settings::default(),
        );
        let look = Look::new(
            world.store.clone(),
            broker.clone(),
            checker,
            recovery,
            world.topology.clone(),
            1,
        );
        (world, broker, look)
    }

    #[tokio::test]
    async fn a_look_tells_what_is_due() {
        let (world, broker, look) = scene().await;
        assert_eq!(look.run_once().await.unwrap(), None);
        world.publish([1]).await;
        look.run_once().await.unwrap();
        let [nothing, due] = &broker.looked.lock().unwrap()[..] else {
            panic!("two looks");
        };
        assert_eq!(*nothing, Due::default());
        let both = ["accounting", "points"].map(str::to_owned);
        assert_eq!(due.to_send, both.into());
    }

    #[tokio::test]
    async fn a_look_that_fails_tells_everybody() {
        let (world, broker, look) = scene().await;
        world.store.fail(&["due"]);
        assert!(look.run_once().await.is_err());
        let topology = world.topology.get();
        let all = Due::all(
            topology.subscriptions.keys().cloned().collect(),
            topology.producers.keys().cloned().collect(),
        );
        assert_eq!(*broker.looked.lock().unwrap(), [all]);
    }
}
