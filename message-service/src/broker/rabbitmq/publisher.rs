//! The publisher alone: one batch at a time on a connection of its own, without leases, lanes or
//! probation. It is what a benchmark compares the relay with.

use std::time::Duration;

use lapin::Connection;
use lapin::options::ConfirmSelectOptions;
use tokio::sync::Mutex;

use super::publish::{Batch, Fate, Outgoing, Progress};
use super::wire;
use crate::store::DeliveryClaim;

/// How long nothing may happen to a batch.
const PATIENCE: Duration = Duration::from_secs(10);

/// A channel in confirm mode.
pub struct Publisher {
    channel: Mutex<lapin::Channel>,
}

impl Publisher {
    /// Opens a channel on this connection.
    ///
    /// # Errors
    /// If RabbitMQ refuses it.
    pub async fn open(connection: &Connection) -> lapin::Result<Self> {
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(Self {
            channel: Mutex::new(channel),
        })
    }

    /// Sends deliveries to the queue of their subscription and waits for every publisher confirm.
    ///
    /// # Errors
    /// What became of the first that is not in its queue.
    pub async fn send(
        &self,
        subscription: &str,
        queue: &str,
        claims: Vec<DeliveryClaim>,
    ) -> Result<(), String> {
        // One batch in flight per channel, as everywhere.
        let channel = self.channel.lock().await;
        let outgoing = claims.into_iter().map(|claim| Outgoing {
            queue: queue.to_owned(),
            properties: wire::properties(subscription, &claim),
            payload: claim.payload,
        });
        let mut batch = Batch::start(&channel, outgoing.collect());
        loop {
            match batch.progress(PATIENCE).await {
                Progress::Complete => break,
                Progress::Moving => {}
                Progress::Quiet => return Err(format!("no publisher confirm in {PATIENCE:?}")),
            }
        }
        let fates = batch.fates("no publisher confirm");
        match fates.into_iter().find(|fate| *fate != Fate::Sent) {
            None => Ok(()),
            Some(fate) => Err(format!("{fate:?}")),
        }
    }
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}
