//! The store on one SQLite file.
//!
//! WAL, `synchronous=FULL`, one writer task, readers that are cut off after a second, and an
//! exclusive lock on the file while it is open. Because the lock proves the predecessor dead,
//! all its leases are void at the start.

mod bodies;
mod checks;
mod console;
mod decisions;
mod deliveries;
mod lists;
mod look;
mod messages;
mod open;
mod outcomes;
mod readers;
mod retire;
mod rows;
mod time;
mod topology;
mod writer;

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

pub use open::{OpenError, migrate};
use readers::Readers;
use time::StoreClock;
use writer::{Kind, Writer};

use super::{
    AnswerOutcome, Applied, CheckClaim, CheckResult, Claimed, Counts, Decision, DeliveryClaim,
    DeliveryCursor, DeliveryView, Due, Error, Handed, Handoff, Heard, Lane, MessageFilter,
    MessageView, Overdue, OverdueDecision, Presence, ReplicaView, Retired, Returned, Sent, Shown,
    Store, TakeTurn, Unsent, Written,
};
use crate::message::{Answer, DeliveryState, MessageId, NewMessage, Timestamp};
use crate::topology::Topology;

/// The store on SQLite. See [`SqliteStore::open`].
pub struct SqliteStore {
    writer: Writer,
    readers: Readers,
    clock: Arc<StoreClock>,
    /// Who holds the lock, as it has said itself: there is no other to tell.
    replica: Mutex<Option<ReplicaView>>,
    /// Held as long as the store lives; the lock ends with the process, however it ends.
    _lock: File,
}

/// Hands a job over to the writer: shares the arguments, so that the job can be repeated.
macro_rules! write {
    ($self:ident, $kind:ident, $rows:expr, $function:path, $($argument:expr),*) => {{
        let arguments = Arc::new(($($argument,)*));
        $self
            .writer
            .write(Kind::$kind, $rows, move |tx| {
                let arguments = Arc::clone(&arguments);
                Box::pin(async move { $function(tx, &arguments).await })
            })
            .await
    }};
}

#[async_trait]
impl Store for SqliteStore {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    async fn apply_topology(&self, topology: Topology) -> Result<Applied, Error> {
        write!(
            self,
            Topology,
            writer::SLICE_ROWS,
            topology::apply,
            topology
        )
    }

    async fn topology(&self) -> Result<Topology, Error> {
        self.readers
            .read("read the topology", |db| Box::pin(topology::load(db)))
            .await
    }

    async fn removed_subscriptions(&self) -> Result<Vec<String>, Error> {
        self.readers
            .read("read removed subscriptions", |db| {
                Box::pin(topology::removed_subscriptions(db))
            })
            .await
    }

    async fn prepare(
        &self,
        messages: Vec<NewMessage>,
        check_after: Duration,
    ) -> Result<Written, Error> {
        let rows = messages.len();
        write!(
            self,
            Prepare,
            rows,
            messages::prepare,
            messages,
            check_after
        )
    }

    /// Leases nothing: its one process claims without another way through the file.
    async fn publish(&self, messages: Vec<NewMessage>, _: Handoff) -> Result<Written, Error> {
        let rows = messages.len();
        write!(self, Publish, rows, messages::publish, messages)
    }

    /// Leases nothing, as above.
    async fn decide(
        &self,
        producer: &str,
        decisions: Vec<Decision>,
        _: Handoff,
    ) -> Result<Written, Error> {
        let rows = decisions.len();
        write!(
            self,
            Decide,
            rows,
            decisions::decide,
            producer.to_owned(),
            decisions
        )
    }

    async fn get(
        &self,
        producer: &str,
        ids: Vec<MessageId>,
    ) -> Result<Vec<Option<(MessageView, Vec<DeliveryView>)>>, Error> {
        let producer = producer.to_owned();
        self.readers
            .read("read messages", move |db| {
                Box::pin(console::get(db, producer, ids))
            })
            .await
    }

    async fn undecided(&self, producer: &str, most: u64) -> Result<u64, Error> {
        let producer = producer.to_owned();
        self.readers
            .read("count undecided messages", move |db| {
                Box::pin(console::undecided(db, producer, most))
            })
            .await
    }

    async fn due(
        &self,
        subscriptions: BTreeSet<String>,
        producers: BTreeSet<String>,
    ) -> Result<Due, Error> {
        let now = self.now();
        self.readers
            .read("look for what is due", move |db| {
                Box::pin(look::look(db, subscriptions, producers, now))
            })
            .await
    }

    async fn claim_checks(
        &self,
        producer: &str,
        limit: usize,
        lease: Duration,
    ) -> Result<Vec<CheckClaim>, Error> {
        write!(
            self,
            ClaimChecks,
            limit,
            checks::claim,
            producer.to_owned(),
            limit,
            lease
        )
    }

    async fn settle_checks(
        &self,
        producer: &str,
        check_after: Duration,
        results: Vec<(CheckClaim, CheckResult)>,
    ) -> Result<(BTreeSet<String>, usize), Error> {
        let rows = results.len();
        write!(
            self,
            SettleChecks,
            rows,
            checks::settle,
            producer.to_owned(),
            check_after,
            results
        )
    }

    async fn check_now(&self, id: MessageId) -> Result<bool, Error> {
        write!(self, ClaimChecks, 1, checks::check_now, id)
    }

    async fn claim_deliveries(
        &self,
        subscription: &str,
        lane: Lane,
        lease: Duration,
    ) -> Result<Claimed, Error> {
        let rows = match lane {
            Lane::Normal { limit, .. } | Lane::Fresh { limit, .. } => limit,
            Lane::Alone => 1,
        };
        write!(
            self,
            Claim,
            rows,
            deliveries::claim,
            subscription.to_owned(),
            lane,
            lease
        )
    }

    async fn load(&self, handed: Vec<Handed>) -> Result<Vec<Option<DeliveryClaim>>, Error> {
        debug_assert!(handed.is_empty(), "this store hands nothing over");
        Ok(Vec::new())
    }

    async fn mark_sent(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        resend_after: Duration,
    ) -> Result<usize, Error> {
        let rows = sent.len();
        write!(
            self,
            Sent,
            rows,
            deliveries::mark_sent,
            subscription.to_owned(),
            sent,
            resend_after
        )
    }

    async fn renew(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        lease: Duration,
    ) -> Result<usize, Error> {
        let rows = sent.len();
        write!(
            self,
            Sent,
            rows,
            deliveries::renew,
            subscription.to_owned(),
            sent,
            lease
        )
    }

    async fn return_unsent(&self, subscription: &str, unsent: Vec<Unsent>) -> Result<usize, Error> {
        let rows = unsent.len();
        write!(
            self,
            Return,
            rows,
            deliveries::return_unsent,
            subscription.to_owned(),
            unsent
        )
    }

    async fn return_deliveries(
        &self,
        subscription: &str,
        returned: Vec<Returned>,
        counts: bool,
    ) -> Result<usize, Error> {
        let rows = returned.len();
        write!(
            self,
            Return,
            rows,
            deliveries::take_back,
            subscription.to_owned(),
            returned,
            counts
        )
    }

    async fn acknowledge(
        &self,
        subscription: &str,
        answers: Vec<Answer>,
    ) -> Result<Vec<AnswerOutcome>, Error> {
        let rows = answers.len();
        write!(
            self,
            Acknowledge,
            rows,
            deliveries::acknowledge,
            subscription.to_owned(),
            answers
        )
    }

    async fn overdue(&self, subscription: &str, limit: usize) -> Result<Vec<Overdue>, Error> {
        let (subscription, now) = (subscription.to_owned(), self.now());
        self.readers
            .read("read overdue deliveries", move |db| {
                Box::pin(deliveries::overdue(db, subscription, limit, now))
            })
            .await
    }

    async fn settle_overdue(
        &self,
        subscription: &str,
        decisions: Vec<(Overdue, OverdueDecision)>,
    ) -> Result<usize, Error> {
        let rows = decisions.len();
        write!(
            self,
            Recover,
            rows,
            deliveries::settle_overdue,
            subscription.to_owned(),
            decisions
        )
    }

    async fn expire(&self, subscription: &str, limit: usize) -> Result<usize, Error> {
        write!(
            self,
            Recover,
            limit,
            deliveries::expire,
            subscription.to_owned(),
            limit
        )
    }

    async fn open_buckets(&self, span: Duration) -> Result<(), Error> {
        write!(self, Retire, 1, bodies::open_ahead, span)
    }

    async fn retire(&self, cutoff: Timestamp) -> Result<Retired, Error> {
        write!(self, Retire, writer::SLICE_ROWS, retire::slice, cutoff)
    }

    async fn backlog_bytes(&self) -> Result<u64, Error> {
        let now = self.now();
        self.readers
            .read("measure the backlog", move |db| {
                Box::pin(console::backlog_bytes(db, now))
            })
            .await
    }

    async fn announce(&self, presence: Presence) -> Result<Heard, Error> {
        let topology_version = self
            .readers
            .read("read the version of the topology", |db| {
                Box::pin(topology::version(db))
            })
            .await?;
        let now = self.now();
        let mut replica = self.replica.lock().unwrap_or_else(PoisonError::into_inner);
        let started_at = replica.as_ref().map_or(now, |replica| replica.started_at);
        *replica = Some(ReplicaView {
            id: presence.id,
            version: presence.version,
            address: presence.address,
            started_at,
            seen_at: now,
            deliveries: presence.deliveries,
            checks: presence.checks,
        });
        Ok(Heard {
            alive: 1,
            topology_version,
            answered: Vec::new(),
        })
    }

    /// There is one process, and the period of the pass is its own.
    async fn take_turn(&self, _: TakeTurn) -> Result<Option<Duration>, Error> {
        Ok(None)
    }

    async fn leave(&self, id: Uuid) -> Result<(), Error> {
        let mut replica = self.replica.lock().unwrap_or_else(PoisonError::into_inner);
        *replica = replica.take().filter(|replica| replica.id != id);
        Ok(())
    }

    async fn replicas(&self) -> Result<Vec<ReplicaView>, Error> {
        let replica = self.replica.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(replica.iter().cloned().collect())
    }

    async fn counts(&self) -> Result<Counts, Error> {
        self.readers
            .read("count messages", |db| Box::pin(console::counts(db)))
            .await
    }

    async fn show(&self, id: MessageId, with_body: bool) -> Result<Option<Shown>, Error> {
        self.readers
            .read("read a message", move |db| {
                Box::pin(console::show(db, id, with_body))
            })
            .await
    }

    async fn list_messages(
        &self,
        filter: MessageFilter,
        after: Option<MessageId>,
        limit: usize,
    ) -> Result<Vec<MessageView>, Error> {
        self.readers
            .read("list messages", move |db| {
                Box::pin(console::list_messages(db, filter, after, limit))
            })
            .await
    }

    async fn list_deliveries(
        &self,
        state: DeliveryState,
        subscription: Option<&str>,
        after: Option<DeliveryCursor>,
        limit: usize,
    ) -> Result<Vec<DeliveryView>, Error> {
        let subscription = subscription.map(str::to_owned);
        self.readers
            .read("list deliveries", move |db| {
                Box::pin(console::list_deliveries(
                    db,
                    state,
                    subscription,
                    after,
                    limit,
                ))
            })
            .await
    }

    async fn close(&self) {
        self.writer.close().await;
        self.readers.close().await;
    }
}

#[cfg(test)]
mod tests;
