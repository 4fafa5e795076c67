//! Finishes payments that no call works on: what a crash, or an unreachable Handfast, has left.
//!
//! It may run in several processes on one database: a payment that is taken is not due again
//! for a while, and the key in Handfast lets one try at a time decide.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::pay::Payments;
use crate::store::Records;

/// Payments that one run takes at most.
const MAX_ROWS: u32 = 32;

/// Runs every `interval` until `shutdown`; a run that has begun is finished.
pub async fn run_until(
    payments: Payments<impl Records>,
    interval: Duration,
    shutdown: CancellationToken,
) {
    loop {
        let stopped = shutdown
            .run_until_cancelled(tokio::time::sleep(interval))
            .await;
        if stopped.is_none() {
            return;
        }
        if let Err(error) = run_once(&payments).await {
            tracing::warn!(%error, "the job could not look for unfinished payments");
        }
    }
}

/// Takes what is due and tries to finish it; returns how many payments it has worked on.
pub async fn run_once(payments: &Payments<impl Records>) -> Result<usize, sqlx::Error> {
    if !payments.store.has_due().await? {
        return Ok(0);
    }
    let orders = payments
        .store
        .claim_due(payments.job_after, MAX_ROWS)
        .await?;
    let mut work = JoinSet::new();
    for order in orders {
        let payments = payments.clone();
        work.spawn(async move {
            match payments.finish_if_idle(&order).await {
                None => false,
                Some(Ok(_)) => true,
                Some(Err(error)) => {
                    tracing::warn!(
                        caller = order.caller,
                        order = order.order_id,
                        %error,
                        "the job could not finish a payment"
                    );
                    true
                }
            }
        });
    }
    let worked_on = work.join_all().await;
    Ok(worked_on.into_iter().filter(|worked| *worked).count())
}
