//! The checks of one producer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::Notify;

use super::Shared;
use super::plan::{back_off, plan};
use crate::message::CheckPolicy;
use crate::pass::Next;
use crate::producer::{Question, VerdictKind};
use crate::store::{self, CheckClaim};

/// What a page of checks did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) asked: usize,
    pub(super) answered: usize,
    pub(super) settled: usize,
    /// As many were due as one call takes, so more may be.
    full: bool,
    /// Nothing was answered: probe again after this long.
    pub(super) retry_after: Option<Duration>,
}

pub(super) struct Lane {
    pub(super) producer: String,
    pub(super) shared: Arc<Shared>,
    pub(super) signal: Notify,
    /// Held during a page, so that a lane never asks twice at once.
    running: tokio::sync::Mutex<()>,
    contact: std::sync::Mutex<Contact>,
    /// Messages that are being asked about.
    pub(super) asking: AtomicUsize,
}

/// How the producer answered so far.
struct Contact {
    /// `None` until it was asked.
    reachable: Option<bool>,
    /// Calls without an answer in a row.
    failures: u32,
    chance: StdRng,
}

impl Lane {
    pub(super) fn new(producer: String, shared: Arc<Shared>) -> Self {
        let contact = Contact {
            reachable: None,
            failures: 0,
            chance: StdRng::seed_from_u64(seed(shared.settings.seed, &producer)),
        };
        Self {
            producer,
            shared,
            signal: Notify::new(),
            asking: AtomicUsize::new(0),
            running: tokio::sync::Mutex::default(),
            contact: std::sync::Mutex::new(contact),
        }
    }

    /// What the lane's jitter comes from: another one for each producer.
    pub(super) fn seed(&self) -> u64 {
        seed(self.shared.settings.seed, &self.producer)
    }

    /// Claims what is due, asks, and writes what was answered.
    pub(super) async fn run_once(&self) -> Result<Page, store::Error> {
        let _running = self.running.lock().await;
        let topology = self.shared.topology.get();
        let Some((endpoint, policy)) = topology.producers.get(&self.producer).and_then(|found| {
            let endpoint = found.status_endpoint.clone()?;
            Some((endpoint, found.checks))
        }) else {
            return Ok(Page::default());
        };
        let limit = self.limit();
        let lease = self.shared.settings.lease;
        let claims = self
            .shared
            .store
            .claim_checks(&self.producer, limit, lease)
            .await?;
        if claims.is_empty() {
            return Ok(Page::default());
        }
        let asked = claims.len();
        self.asking.store(asked, Ordering::Relaxed);
        let (verdicts, retry_after) = self.ask(&endpoint, &claims).await;
        let answered = verdicts.iter().flatten().count();
        let settled = self.settle(policy, claims, &verdicts, retry_after).await;
        self.asking.store(0, Ordering::Relaxed);
        let settled = settled?;
        Ok(Page {
            asked,
            answered,
            settled,
            full: asked >= handfast_proto::MAX_QUESTIONS,
            retry_after,
        })
    }

    /// The verdicts, and when to try again if there is not a single one.
    async fn ask(
        &self,
        endpoint: &str,
        claims: &[CheckClaim],
    ) -> (Vec<Option<VerdictKind>>, Option<Duration>) {
        let questions = claims.iter().map(Question::from).collect();
        let reason = match self.shared.source.check(endpoint, questions).await {
            Ok(verdicts) if verdicts.iter().any(Option::is_some) => {
                self.answered();
                return (verdicts, None);
            }
            Ok(_) => format!("{endpoint} answered none of {} questions", claims.len()),
            Err(unreachable) => unreachable.to_string(),
        };
        (Vec::new(), Some(self.unanswered(&reason)))
    }

    async fn settle(
        &self,
        policy: CheckPolicy,
        claims: Vec<CheckClaim>,
        verdicts: &[Option<VerdictKind>],
        retry_after: Option<Duration>,
    ) -> Result<usize, store::Error> {
        // A question that the reply left out while others were answered is asked again by the
        // producer's own schedule: the producer is there, and asking at once would not help.
        let retry_after = retry_after.unwrap_or(policy.check_after);
        let results = plan(claims, verdicts, retry_after);
        let (topics, settled) = self
            .shared
            .store
            .settle_checks(&self.producer, policy.check_after, results)
            .await?;
        if !topics.is_empty() {
            self.shared.broker.due(&topics);
        }
        Ok(settled)
    }

    /// One message while the producer does not answer, else as many as one call takes.
    fn limit(&self) -> usize {
        if self.contact().failures > 0 {
            1
        } else {
            handfast_proto::MAX_QUESTIONS
        }
    }

    fn answered(&self) {
        let mut contact = self.contact();
        contact.failures = 0;
        let before = contact.reachable.replace(true);
        drop(contact);
        if before == Some(false) {
            tracing::info!(producer = %self.producer, "producer {} answers again", self.producer);
        }
        if before != Some(true) {
            (self.shared.on_reachable)(&self.producer, true);
        }
    }

    fn unanswered(&self, reason: &str) -> Duration {
        let settings = &self.shared.settings;
        let mut contact = self.contact();
        contact.failures = contact.failures.saturating_add(1);
        let chance = contact.chance.random::<f64>();
        let wait = back_off(
            contact.failures,
            settings.first_retry,
            settings.slowest_retry,
            chance,
        );
        let before = contact.reachable.replace(false);
        drop(contact);
        if before != Some(false) {
            tracing::warn!(
                producer = %self.producer, reason,
                "producer {} does not answer status checks; its messages stay PREPARED: {reason}",
                self.producer
            );
            (self.shared.on_reachable)(&self.producer, false);
        }
        wait
    }

    fn contact(&self) -> std::sync::MutexGuard<'_, Contact> {
        // A panic while the lock is held leaves plain values, which are never half-written.
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    pub(super) fn next(&self) -> Next {
        match self.retry_after {
            Some(wait) => Next::NotBefore(wait),
            None if self.full || self.probed() => Next::Now,
            None => Next::Signal,
        }
    }

    /// A single question that was answered may have been the probe after which the lane goes
    /// on at full speed.
    fn probed(&self) -> bool {
        self.asked == 1 && self.answered == 1
    }
}

impl From<&CheckClaim> for Question {
    fn from(claim: &CheckClaim) -> Self {
        Self {
            id: claim.id,
            topic: claim.topic.clone(),
            key: claim.key.clone(),
            fence: claim.fence,
            prepared_at: claim.prepared_at,
        }
    }
}

fn seed(seed: u64, name: &str) -> u64 {
    // FNV-1a: the same name gives the same jitter in every process, which `DefaultHasher`
    // does not promise.
    name.bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
