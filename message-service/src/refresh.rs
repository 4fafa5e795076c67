//! Reads the topology that is in force from the store.
//!
//! The store decides who gets a message; this copy serves early refusals and tells the passes
//! whom they work for, so it may be a moment old.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::pass::{self, Next, Pace};
use crate::store::{self, Store};
use crate::topology::Snapshot;

/// How often the topology is read by default.
pub const PERIOD: Duration = Duration::from_secs(1);

/// Keeps a [`Snapshot`] current.
pub struct Refresh {
    store: Arc<dyn Store>,
    topology: Arc<Snapshot>,
    period: Duration,
    seed: u64,
}

impl Refresh {
    /// Reads from the store into the snapshot every `period`.
    pub fn new(
        store: Arc<dyn Store>,
        topology: Arc<Snapshot>,
        period: Duration,
        seed: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            topology,
            period,
            seed,
        })
    }

    /// Reads until stopped.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let pace = Pace::new(self.period, self.seed);
        pass::run("topology", pace, &Notify::new(), &stop, || async {
            self.run_once().await.map(|_| Next::Signal)
        })
        .await;
    }

    /// Reads once. True if the topology was another one.
    pub async fn run_once(&self) -> Result<bool, store::Error> {
        let read = self.store.topology().await?;
        let changed = *self.topology.get() != read;
        if changed {
            tracing::info!(
                version = read.version,
                "topology {} is in force",
                read.version
            );
            self.topology.set(read);
        }
        Ok(changed)
    }
}
