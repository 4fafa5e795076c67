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

/// The wait after the store could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps a [`Snapshot`] current: whoever hears which version is in force says so once a second.
pub struct Refresh {
    store: Arc<dyn Store>,
    topology: Arc<Snapshot>,
    seed: u64,
    /// Another one may be in force.
    signal: Notify,
}

impl Refresh {
    /// Reads from the store into the snapshot.
    pub fn new(store: Arc<dyn Store>, topology: Arc<Snapshot>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            store,
            topology,
            seed,
            signal: Notify::new(),
        })
    }

    /// Reads until stopped.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let pace = Pace::when_told(pass::QUIET, RETRY, self.seed);
        pass::run("topology", pace, &self.signal, &stop, || async {
            self.run_once().await.map(|_| Next::Signal)
        })
        .await;
    }

    /// The version that is in force. If it is not the one that was read, that one is read now.
    pub fn heard(&self, version: u64) {
        if version != self.topology.get().version {
            self.signal.notify_one();
        }
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
