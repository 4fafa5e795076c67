//! Brings back what got lost on its way: sent, unanswered, and passed by.
//!
//! Overdue is not lost. A consumer that has a backlog is slow to answer everything, and
//! sending it all again would only make the backlog longer, without end. So a delivery is sent
//! again only when its subscription has passed it by: something that was sent well after it
//! was answered, or its queue is known not to hold it any more. All else waits.
//!
//! One process runs the pass for all, in turns. It may run at the same time as another one all the
//! same: what it writes repeats in the store what it was decided on. Who is in grace has its turn
//! too, and only looks at ages; what it leaves is looked at a period later.

mod plan;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::answered::{Answered, Moment};
use crate::broker::Broker;
use crate::clock::Clock;
use crate::pass::{self, Next, Pace};
use crate::store::{self, OverdueDecision, Store};
use crate::topology::Snapshot;
use crate::turn::Turn;

/// How many rows one write touches.
const SLICE: usize = 500;

/// When silence is taken for loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Nothing is sent again in this time after the start and after an outage of the store:
    /// answers that could not be given meanwhile come first.
    pub grace: Duration,
    /// Something sent this much later has to be answered before a delivery counts as lost.
    pub passed_by: Duration,
    /// A delivery that is overdue and not lost is looked at again after this long.
    pub resend_after: Duration,
    /// How often the pass runs while something is overdue.
    pub period: Duration,
    /// What the jitter of the period comes from.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(30),
            passed_by: Duration::from_secs(30),
            resend_after: Duration::from_secs(45),
            period: Duration::from_secs(1),
            seed: 0,
        }
    }
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Deliveries that became DEAD because of their age.
    pub expired: usize,
    /// Overdue deliveries that were looked at.
    pub overdue: usize,
    /// Those of them that were passed by.
    pub passed_by: usize,
    /// Decisions that were written.
    pub settled: usize,
    /// Subscriptions with more overdue deliveries than one slice.
    pub more: usize,
}

/// Brings back what got lost.
pub struct Recovery {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    answered: Arc<Answered>,
    topology: Arc<Snapshot>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    state: Mutex<State>,
    /// Something may be overdue.
    signal: Notify,
}

struct State {
    /// Monotonic time of the start, or of the last error of the store.
    trouble_at: Duration,
    /// For each subscription whose answers waited to be written: since when.
    waiting_since: HashMap<String, Moment>,
}

impl Recovery {
    /// Looks at all subscriptions of the topology. Grace begins now.
    pub fn new(
        store: Arc<dyn Store>,
        broker: Arc<dyn Broker>,
        answered: Arc<Answered>,
        topology: Arc<Snapshot>,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Arc<Self> {
        let state = Mutex::new(State {
            trouble_at: clock.monotonic(),
            waiting_since: HashMap::new(),
        });
        Arc::new(Self {
            store,
            broker,
            answered,
            topology,
            clock,
            settings,
            state,
            signal: Notify::new(),
        })
    }

    /// How often the pass runs at most, by whatever process.
    pub fn period(&self) -> Duration {
        self.settings.period
    }

    /// Looks until stopped, when something may be overdue and it is this process's turn.
    pub async fn run(self: Arc<Self>, turn: Turn, stop: CancellationToken) {
        let Settings { period, seed, .. } = self.settings;
        let pace = Pace::when_told(period.max(pass::QUIET), period, seed);
        pass::run("recovery", pace, &self.signal, &stop, || {
            self.take_turn(&turn)
        })
        .await;
    }

    /// Something may be overdue, or too old.
    pub fn due(&self) {
        self.signal.notify_one();
    }

    async fn take_turn(&self, turn: &Turn) -> Result<Next, store::Error> {
        let taken = turn.take().await.inspect_err(|_| self.distrust_silence());
        if let Some(wait) = taken? {
            return Ok(Next::NotBefore(wait));
        }
        loop {
            let report = self.run_in(Some(turn)).await?;
            // Without progress another run would only find the same.
            let more = report.more > 0 && report.settled > 0;
            if !more || !self.goes_on(Some(turn)).await? {
                return Ok(Next::Signal);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Looks at every subscription once. One that fails does not keep the others from their
    /// turn; the first error is returned.
    pub async fn run_once(&self) -> Result<Report, store::Error> {
        self.run_in(None).await
    }

    /// Ends early if it depends on a turn, and that is another process's now.
    async fn run_in(&self, turn: Option<&Turn>) -> Result<Report, store::Error> {
        let topology = self.topology.get();
        self.lock()
            .waiting_since
            .retain(|name, _| topology.subscriptions.contains_key(name));
        let mut report = Report::default();
        let mut first_error = None;
        for (name, subscription) in &topology.subscriptions {
            // Age has nothing to do with silence: an error of the one is no ground to distrust
            // the other.
            match self.expire(name, turn).await {
                Ok(expired) => report.expired += expired,
                Err(error) => drop(first_error.get_or_insert(error)),
            }
            if let Err(error) = self.look_at(name, &subscription.topic, &mut report).await {
                self.distrust_silence();
                first_error.get_or_insert(error);
            }
            if !self.goes_on(turn).await? {
                break;
            }
        }
        first_error.map_or(Ok(report), Err)
    }

    async fn look_at(
        &self,
        name: &str,
        topic: &str,
        report: &mut Report,
    ) -> Result<(), store::Error> {
        // Asked also while nothing may be resent, so that no outage of the store goes unnoticed.
        let overdue = self.store.overdue(name, SLICE).await?;
        if !self.may_resend(name) || overdue.is_empty() {
            return Ok(());
        }
        report.overdue += overdue.len();
        report.more += usize::from(overdue.len() >= SLICE);
        let gone = self.broker.is_gone(name, &overdue).await;
        let through = self.answered.latest(name);
        let decisions = plan::plan(overdue, &gone, through, &self.settings);
        let passed_by = decisions
            .iter()
            .filter(|(_, decision)| *decision == OverdueDecision::PassedBy)
            .count();
        report.passed_by += passed_by;
        report.settled += self.store.settle_overdue(name, decisions).await?;
        if passed_by > 0 {
            tracing::info!(
                subscription = name,
                passed_by,
                "{passed_by} deliveries of {name} were passed by and are sent again"
            );
            self.broker.due(&[topic.to_owned()].into());
        }
        Ok(())
    }

    async fn expire(&self, subscription: &str, turn: Option<&Turn>) -> Result<usize, store::Error> {
        let mut expired = 0;
        loop {
            let slice = self.store.expire(subscription, SLICE).await?;
            expired += slice;
            if slice < SLICE || !self.goes_on(turn).await? {
                return Ok(expired);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn goes_on(&self, turn: Option<&Turn>) -> Result<bool, store::Error> {
        let Some(turn) = turn else { return Ok(true) };
        turn.keep().await.inspect_err(|_| self.distrust_silence())
    }

    /// Grace begins again: the store was away, and with it the answers. Whoever asks the store
    /// once a second says so, so that no outage goes unnoticed.
    pub fn distrust_silence(&self) {
        self.lock().trouble_at = self.clock.monotonic();
    }

    /// True if what is silent now was not answered before a moment that is over: grace has
    /// passed, and every answer that had arrived at that moment is durable. Under load some
    /// answer always waits, so waiting for none would be waiting for ever.
    fn may_resend(&self, subscription: &str) -> bool {
        let mut state = self.lock();
        if self.clock.monotonic() < state.trouble_at + self.settings.grace {
            return false;
        }
        let moment = state
            .waiting_since
            .remove(subscription)
            .unwrap_or_else(|| self.answered.moment(subscription));
        let written = self.answered.is_written(subscription, moment);
        if !written {
            state.waiting_since.insert(subscription.to_owned(), moment);
        }
        written
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while the lock is held leaves whole values.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
