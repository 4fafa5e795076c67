//! What is written about deliveries that streams hold: SENT, and their return.

use std::sync::Weak;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Embedded;
use crate::pass::Trouble;
use crate::store::{DeliveryClaim, Error, Returned, Sent};

/// Rows in one write.
const SLICE: usize = 500;
/// The wait after the first return that failed; doubles with every further one.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// The longest wait between two tries.
const SLOWEST_RETRY: Duration = Duration::from_secs(5);

/// Bytes of payload and headers.
pub(super) fn body_bytes(claim: &DeliveryClaim) -> usize {
    let headers = claim.headers.iter();
    claim.payload.len() + headers.map(|(n, v)| n.len() + v.len()).sum::<usize>()
}

/// Writes SENT every `period`, as long as the broker lives.
pub(super) async fn mark_sent(broker: Weak<Embedded>, period: Duration, stop: CancellationToken) {
    let mut trouble = Trouble::new("marking deliveries SENT");
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(period) => {}
        }
        let Some(broker) = broker.upgrade() else {
            return;
        };
        trouble.note(broker.flush().await);
    }
}

impl Embedded {
    /// Writes SENT for everything that streams hold and that is not marked yet. What was
    /// answered meanwhile is not held any more, and so is skipped. Returns how many rows.
    pub async fn flush(&self) -> Result<usize, Error> {
        let subscriptions: Vec<String> = self.lock().queues.keys().cloned().collect();
        let mut written = 0;
        let mut first_error = None;
        for subscription in subscriptions {
            match self.flush_one(&subscription).await {
                Ok(rows) => written += rows,
                Err(error) => {
                    first_error.get_or_insert(error);
                    self.renew(&subscription).await;
                }
            }
        }
        first_error.map_or(Ok(written), Err)
    }

    async fn flush_one(&self, subscription: &str) -> Result<usize, Error> {
        let mut written = 0;
        let unmarked: Vec<Sent> = self
            .unmarked(subscription)
            .into_iter()
            .map(|(sent, _)| sent)
            .collect();
        for slice in unmarked.chunks(SLICE) {
            written += self
                .store
                .mark_sent(subscription, slice.to_vec(), self.settings.resend_after)
                .await?;
            if let Some(queue) = self.lock().queue(subscription) {
                queue.marked(slice);
            }
        }
        Ok(written)
    }

    /// While SENT cannot be written, the lease is what keeps a delivery from being sent to
    /// somebody else, so it is renewed once a third of it is gone.
    async fn renew(&self, subscription: &str) {
        let now = self.clock.monotonic();
        let third = self.settings.lease / 3;
        let old: Vec<Sent> = self
            .unmarked(subscription)
            .into_iter()
            .filter(|(_, leased_at)| now.saturating_sub(*leased_at) >= third)
            .map(|(sent, _)| sent)
            .collect();
        for slice in old.chunks(SLICE) {
            let renewed = self
                .store
                .renew(subscription, slice.to_vec(), self.settings.lease)
                .await;
            match renewed {
                Ok(_) => {
                    if let Some(queue) = self.lock().queue(subscription) {
                        queue.renewed(slice, now);
                    }
                }
                // The flush that failed before is reported, and the next one tries again.
                Err(_) => return,
            }
        }
    }

    fn unmarked(&self, subscription: &str) -> Vec<(Sent, Duration)> {
        let mut state = self.lock();
        let queue = state.queue(subscription);
        queue.map(|queue| queue.unmarked()).unwrap_or_default()
    }
}

/// Returns deliveries, however long the store does not answer: without it they would wait for
/// their lease or for the recovery pass. Ends early only when the service has stopped, and
/// then the next start finds their leases void.
pub(super) async fn give_back(
    broker: &Embedded,
    subscription: &str,
    held: Vec<Returned>,
    counts: bool,
) {
    let mut trouble = Trouble::new(format!("returning deliveries of {subscription}"));
    for slice in held.chunks(SLICE) {
        let mut wait = FIRST_RETRY;
        loop {
            let done = broker
                .store
                .return_deliveries(subscription, slice.to_vec(), counts)
                .await;
            // What cannot be read is not healed by repeating; its silence is found later.
            let hopeless = matches!(done, Err(Error::Inconsistent { .. }));
            if trouble.note(done).is_some() || hopeless {
                break;
            }
            tokio::select! {
                () = broker.stopped.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(SLOWEST_RETRY);
        }
    }
}
