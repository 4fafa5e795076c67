//! Calls at their times, whether or not the ones before have ended: who comes late because somebody
//! else did is late.
//!
//! The times are kept by a thread, since the runtime's timers are as coarse as what is measured.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::Failure;

/// Starts so many calls, each so much ahead of its time, and tells each when its time has come.
/// Returns when all have ended, or one has failed.
pub(crate) async fn run<F>(
    zero: Instant,
    count: u64,
    due: impl Fn(u64) -> Duration + Send + 'static,
    ahead: Duration,
    call: impl Fn(u64, oneshot::Receiver<()>) -> F + Send + 'static,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let runtime = tokio::runtime::Handle::current();
    let calls = tokio::task::spawn_blocking(move || {
        let mut calls = JoinSet::new();
        let mut waiting: VecDeque<oneshot::Sender<()>> = VecDeque::new();
        let (mut started, mut told) = (0, 0);
        while told < count {
            let start_at = due(started).saturating_sub(ahead);
            if started < count && start_at <= due(told) {
                sleep_until(zero + start_at);
                let (go, wait) = oneshot::channel();
                waiting.push_back(go);
                calls.spawn_on(call(started, wait), &runtime);
                started += 1;
                continue;
            }
            sleep_until(zero + due(told));
            if let Some(go) = waiting.pop_front() {
                // A call that failed does not wait for its time.
                let _ = go.send(());
            }
            told += 1;
        }
        calls
    });
    let mut calls = calls.await.map_err(Failure::of("keep the times"))?;
    while let Some(done) = calls.join_next().await {
        done.map_err(Failure::of("call"))??;
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own, and the time is the condition"
)]
fn sleep_until(time: Instant) {
    let left = time.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        thread::sleep(left);
    }
}
