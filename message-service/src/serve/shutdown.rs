//! The end in good order.
//!
//! NOT_SERVING at once, so that nobody new comes · no new claims, of deliveries or of checks ·
//! consumers may answer what they have, for a fifth of the time · streams close and what they
//! held is due again · no more calls, but those in flight are answered · the store finishes
//! what is queued and closes. All of it within the deadline: tonic alone would wait for open
//! streams for ever. Nothing depends on it, because what was acknowledged is durable and the
//! next start finds all leases void; it saves others from waiting.

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;

use super::{Error, Running, SERVICES};

/// Which part of the deadline consumers get to answer what they hold.
const ANSWERS_SHARE: u32 = 5;
/// Which part of the deadline is kept for the calls that are in flight at the end.
const CALLS_SHARE: u32 = 5;
/// How long the store may take to hear that this replica ends.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// How long the store may take to finish what is queued. It is counted extra, so that a call
/// that was cut off does not take its neighbours' writes along.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

impl Running {
    /// Serves until `stop` is cancelled, then ends within `shutdown_deadline` and at most 6 s
    /// more for the store. An end that had to cut calls off is logged, and is success too.
    pub async fn until(mut self, stop: CancellationToken) -> Result<(), Error> {
        tokio::select! {
            () = stop.cancelled() => {}
            ended = &mut self.server => {
                let why = match ended {
                    Ok(Ok(())) => "it stopped accepting connections".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(error) => error.to_string(),
                };
                self.parts.stop.cancel();
                self.close().await;
                return Err(Error::Ended { listen: self.address, why });
            }
        }
        let deadline = Instant::now() + self.shutdown_deadline;
        for service in SERVICES {
            self.health
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        self.parts.stop.cancel();
        let answers_within = self.shutdown_deadline / ANSWERS_SHARE;
        let carrier = self.parts.carrier.shutdown(answers_within);
        let calls_within = self.shutdown_deadline / CALLS_SHARE;
        if timeout_at(deadline - calls_within, carrier).await.is_err() {
            tracing::warn!("the deadline came before everything on its way had arrived");
        }
        self.no_more_calls.cancel();
        self.end_watches().await;
        if timeout_at(deadline, &mut self.server).await.is_err() {
            self.server.abort();
            tracing::warn!("the deadline came before all calls were answered; they are cut off");
        }
        if timeout_at(deadline, self.parts.passes.wait())
            .await
            .is_err()
        {
            tracing::warn!("the deadline came before all passes ended");
        }
        self.close().await;
        tracing::info!("stopped");
        Ok(())
    }

    /// A watch on the health of a service would go on for ever. Whoever watches gets
    /// NOT_SERVING first: a change is delivered before an end.
    async fn end_watches(&mut self) {
        for service in SERVICES {
            self.health.clear_service_status(service).await;
        }
    }

    async fn close(&self) {
        if timeout(LEAVE_WITHIN, self.parts.presence.leave())
            .await
            .is_err()
        {
            tracing::debug!("the store did not hear that this replica ends");
        }
        if timeout(CLOSE_WITHIN, self.parts.store.close())
            .await
            .is_err()
        {
            tracing::warn!("the store did not close in time; the next start recovers it");
        }
    }
}
