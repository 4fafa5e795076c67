//! Removes what was finished long ago, and opens body buckets ahead of use.
//!
//! Removing trusts a clock, and a clock that jumped a year ahead for a minute would remove
//! everything finished. So this pass removes only if the store's clock moved since the last
//! pass by what the monotonic clock did; otherwise it waits an hour and says so.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::message::Timestamp;
use crate::pass::{self, Next, Pace};
use crate::store::{self, Store};
use crate::turn::Turn;

/// How far the two clocks may move apart between two passes.
const TOLERANCE: Duration = Duration::from_secs(60);
/// How long nothing is removed after they moved apart.
const DISTRUST: Duration = Duration::from_secs(3_600);

/// What is kept, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Finished messages stay this long.
    pub keep: Duration,
    /// A body bucket takes new bodies this long.
    pub bucket_span: Duration,
    /// How often the pass runs.
    pub period: Duration,
    /// What the jitter of the period comes from.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        const DAY: u64 = 86_400;
        Self {
            keep: Duration::from_secs(7 * DAY),
            bucket_span: Duration::from_secs(DAY),
            period: Duration::from_secs(60),
            seed: 0,
        }
    }
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// False if the clock gave no ground to remove anything.
    pub pruned: bool,
    /// Messages that were removed.
    pub messages: u64,
    /// Bodies that were copied to a newer bucket.
    pub moved: u64,
    /// Buckets that were dropped.
    pub buckets: u64,
}

/// Removes what was finished long ago.
pub struct Retention {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    trust: Mutex<Trust>,
}

/// What both clocks said at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    store: Timestamp,
    monotonic: Duration,
}

/// What is known about the store's clock.
#[derive(Clone, Copy, Debug, Default)]
struct Trust {
    last: Option<Reading>,
    /// Monotonic time until which the clock is not believed.
    distrusted_until: Option<Duration>,
}

/// Whether a reading is ground to remove something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement {
    /// The clock is steady.
    Prune,
    /// The first reading: there is nothing to compare it with.
    NoReference,
    /// The clock moved by this much more (or less) than time did.
    Jumped { micros: i64 },
    /// It jumped less than an hour ago.
    Distrusted,
}

impl Trust {
    /// Judges a reading and remembers it.
    fn judge(&mut self, now: Reading) -> Judgement {
        let Some(last) = self.last.replace(now) else {
            return Judgement::NoReference;
        };
        let moved = now.store.as_micros().saturating_sub(last.store.as_micros());
        let passed = now.monotonic.saturating_sub(last.monotonic).as_micros();
        let micros = moved.saturating_sub(i64::try_from(passed).unwrap_or(i64::MAX));
        if u128::from(micros.unsigned_abs()) > TOLERANCE.as_micros() {
            self.distrusted_until = Some(now.monotonic + DISTRUST);
            return Judgement::Jumped { micros };
        }
        match self.distrusted_until {
            Some(until) if now.monotonic < until => Judgement::Distrusted,
            Some(_) | None => {
                self.distrusted_until = None;
                Judgement::Prune
            }
        }
    }
}

impl Retention {
    /// Removes from this store; the clock is only asked how much time passed.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            store,
            clock,
            settings,
            trust: Mutex::default(),
        })
    }

    /// How often the pass runs, by whatever process.
    pub fn period(&self) -> Duration {
        self.settings.period
    }

    /// Removes until stopped, when it is this process's turn.
    pub async fn run(self: Arc<Self>, turn: Turn, stop: CancellationToken) {
        let pace = Pace::new(self.settings.period, self.settings.seed);
        pass::run("retention", pace, &Notify::new(), &stop, || {
            self.take_turn(&turn)
        })
        .await;
    }

    async fn take_turn(&self, turn: &Turn) -> Result<Next, store::Error> {
        if let Some(wait) = turn.take().await? {
            // When it is this process's turn, there is something to compare the clock with.
            self.believed();
            return Ok(Next::NotBefore(wait));
        }
        self.run_in(Some(turn)).await?;
        Ok(Next::Signal)
    }

    /// Opens buckets, then removes what may go, slice by slice, so that calls come in between.
    pub async fn run_once(&self) -> Result<Report, store::Error> {
        self.run_in(None).await
    }

    /// Goes on from slice to slice for as long as the turn, if it depends on one, is this
    /// process's.
    async fn run_in(&self, turn: Option<&Turn>) -> Result<Report, store::Error> {
        self.store.open_buckets(self.settings.bucket_span).await?;
        let mut report = Report::default();
        // The clock may jump between two slices as well as between two passes.
        while let Some(now) = self.believed() {
            report.pruned = true;
            let slice = self.store.retire(now.before(self.settings.keep)).await?;
            report.messages += slice.messages;
            report.moved += slice.moved;
            report.buckets += slice.buckets;
            if !slice.more {
                break;
            }
            if let Some(turn) = turn
                && !turn.keep().await?
            {
                break;
            }
            tokio::task::yield_now().await;
        }
        Ok(report)
    }

    /// The store's time, if there is ground to believe it.
    fn believed(&self) -> Option<Timestamp> {
        let now = Reading {
            store: self.store.now(),
            monotonic: self.clock.monotonic(),
        };
        // A panic while the lock is held leaves plain values, which are never half-written.
        let mut trust = self.trust.lock().unwrap_or_else(PoisonError::into_inner);
        let judgement = trust.judge(now);
        drop(trust);
        if let Judgement::Jumped { micros } = judgement {
            tracing::warn!(
                jumped_ms = micros / 1_000,
                wait_s = DISTRUST.as_secs(),
                "the store's clock moved {} ms more than time did; nothing is removed for an \
                 hour; check the clock of the database's host",
                micros / 1_000
            );
        }
        (judgement == Judgement::Prune).then_some(now.store)
    }
}

#[cfg(test)]
mod tests;
