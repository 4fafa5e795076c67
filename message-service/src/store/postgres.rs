//! The store on PostgreSQL 14 or later.
//!
//! Every write is one statement over arrays and a transaction of its own, sent by the lane of its
//! kind; nothing is remembered here that another process would have to know, so several may use
//! one database. The clock is the database's.

mod answers;
mod bodies;
mod checks;
mod console;
mod decisions;
mod deliveries;
mod handoff;
mod lanes;
mod look;
mod marks;
mod messages;
mod open;
mod outcomes;
mod readers;
mod recent;
mod replicas;
mod retire;
mod rows;
mod session;
mod time;
mod topology;
mod turns;
mod verbs;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::PgConnectOptions;
use tokio::task::JoinHandle;
use uuid::Uuid;

use answers::{Acknowledge, Back, Recover, Recovery, TakeBack};
use bodies::Bodies;
use checks::{ClaimChecks, Due as DueChecks, DueReply, SettleChecks};
use decisions::Decide;
use deliveries::{Claim, Leased, MarkSent};
use lanes::Lane as WriteLane;
use marks::Marks;
use messages::{Prepare, Publish};
pub use open::{Address, OpenError, migrate};
use readers::Readers;
use replicas::{Announce, Said};
use retire::{Retire, Wanted};
use session::Repeats;
use time::StoreClock;
use topology::Apply;
use turns::Turns;

use super::{
    AnswerOutcome, Applied, CheckClaim, CheckResult, Claimed, Counts, Decision, DeliveryClaim,
    DeliveryCursor, DeliveryView, Due, Error, Handed, Handoff, Heard, Lane, MessageFilter,
    MessageView, Overdue, OverdueDecision, Presence, ReplicaView, Retired, Returned, Sent, Shown,
    Store, TakeTurn, Unsent, Written,
};
use crate::message::{Answer, DeliveryState, MessageId, NewMessage, Timestamp};
use crate::topology::Topology;

/// The store on PostgreSQL. See [`PostgresStore::open`].
pub struct PostgresStore {
    lanes: Lanes,
    written: Arc<Bodies>,
    /// For calls of producers and for passes.
    readers: Readers,
    /// For what is about to be sent: nobody else is to hold that up.
    bodies: Readers,
    /// For people: what they look at may be large, and nobody else is to wait for it.
    people: Readers,
    marks: Arc<Marks>,
    clock: Arc<StoreClock>,
    identity: Uuid,
    options: Arc<PgConnectOptions>,
    repeats: Arc<Repeats>,
    /// Keeps the estimate of the database's clock right.
    watch: JoinHandle<()>,
}

/// One lane per kind of write.
struct Lanes {
    apply: WriteLane<Apply>,
    prepare: WriteLane<Prepare>,
    publish: WriteLane<Publish>,
    decide: WriteLane<Decide>,
    claim_checks: WriteLane<ClaimChecks>,
    settle_checks: WriteLane<SettleChecks>,
    claim: WriteLane<Claim>,
    sent: WriteLane<MarkSent>,
    acknowledge: WriteLane<Acknowledge>,
    take_back: WriteLane<TakeBack>,
    recover: WriteLane<Recover>,
    retire: WriteLane<Retire>,
    announce: WriteLane<Announce>,
    turns: WriteLane<Turns>,
}

impl PostgresStore {
    /// Tells this store from every other: made once, kept in the database.
    pub fn identity(&self) -> Uuid {
        self.identity
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

#[async_trait]
impl Store for PostgresStore {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    async fn apply_topology(&self, topology: Topology) -> Result<Applied, Error> {
        self.lanes.apply.call(topology).await
    }

    async fn topology(&self) -> Result<Topology, Error> {
        self.readers
            .read("read the topology", |db| {
                Box::pin(db.with(|db| Box::pin(topology::load(db))))
            })
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
        self.lanes.prepare.call((messages, check_after)).await
    }

    async fn publish(&self, messages: Vec<NewMessage>, handoff: Handoff) -> Result<Written, Error> {
        self.lanes.publish.call((messages, handoff)).await
    }

    async fn decide(
        &self,
        producer: &str,
        decisions: Vec<Decision>,
        handoff: Handoff,
    ) -> Result<Written, Error> {
        self.lanes
            .decide
            .call((producer.to_owned(), decisions, handoff))
            .await
    }

    async fn get(
        &self,
        producer: &str,
        ids: Vec<MessageId>,
    ) -> Result<Vec<Option<(MessageView, Vec<DeliveryView>)>>, Error> {
        let wanted = Arc::new((producer.to_owned(), ids));
        self.readers
            .read("read messages", move |db| {
                let wanted = Arc::clone(&wanted);
                Box::pin(async move { console::get_many(db, &wanted.0, &wanted.1).await })
            })
            .await
    }

    async fn undecided(&self, producer: &str, most: u64) -> Result<u64, Error> {
        let producer = Arc::new(producer.to_owned());
        self.readers
            .read("count undecided messages", move |db| {
                let producer = Arc::clone(&producer);
                Box::pin(async move { console::undecided(db, &producer, most).await })
            })
            .await
    }

    async fn due(
        &self,
        subscriptions: BTreeSet<String>,
        producers: BTreeSet<String>,
    ) -> Result<Due, Error> {
        let of = Arc::new((subscriptions, producers));
        let marks = Arc::clone(&self.marks);
        self.readers
            .read("look for what is due", move |db| {
                let (of, marks) = (Arc::clone(&of), Arc::clone(&marks));
                Box::pin(async move { look::look(db, &marks, &of.0, &of.1).await })
            })
            .await
    }

    async fn claim_checks(
        &self,
        producer: &str,
        limit: usize,
        lease: Duration,
    ) -> Result<Vec<CheckClaim>, Error> {
        let due = DueChecks::Claim(producer.to_owned(), limit, lease);
        match self.lanes.claim_checks.call(due).await? {
            DueReply::Claims(claims) => Ok(claims),
            DueReply::IsPrepared(_) => Ok(Vec::new()),
        }
    }

    async fn settle_checks(
        &self,
        _producer: &str,
        check_after: Duration,
        results: Vec<(CheckClaim, CheckResult)>,
    ) -> Result<(BTreeSet<String>, usize), Error> {
        self.lanes.settle_checks.call((check_after, results)).await
    }

    async fn check_now(&self, id: MessageId) -> Result<bool, Error> {
        match self.lanes.claim_checks.call(DueChecks::Now(id)).await? {
            DueReply::IsPrepared(is_prepared) => Ok(is_prepared),
            DueReply::Claims(_) => Ok(false),
        }
    }

    async fn claim_deliveries(
        &self,
        subscription: &str,
        lane: Lane,
        lease: Duration,
    ) -> Result<Claimed, Error> {
        self.lanes
            .claim
            .call((subscription.to_owned(), lane, lease))
            .await
    }

    async fn load(&self, handed: Vec<Handed>) -> Result<Vec<Option<DeliveryClaim>>, Error> {
        let recent = |one: &Handed| {
            let body = self.written.recent.get(one.id, &one.content_hash)?;
            Some(handoff::claim(one, &body))
        };
        let mut claims: Vec<_> = handed.iter().map(recent).collect();
        let missing = handed.into_iter().zip(&claims);
        let missing = missing.filter_map(|(one, claim)| claim.is_none().then_some(one));
        let missing: Arc<Vec<_>> = Arc::new(missing.collect());
        if !missing.is_empty() {
            let read = self.bodies.read("read bodies", move |db| {
                let missing = Arc::clone(&missing);
                Box::pin(async move { handoff::load(db, &missing).await })
            });
            let mut read = read.await?.into_iter();
            for claim in claims.iter_mut().filter(|claim| claim.is_none()) {
                *claim = read.next().flatten();
            }
        }
        Ok(claims)
    }

    async fn mark_sent(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        resend_after: Duration,
    ) -> Result<usize, Error> {
        let sent = Leased::Mark(subscription.to_owned(), sent, resend_after);
        self.lanes.sent.call(sent).await
    }

    async fn renew(
        &self,
        subscription: &str,
        sent: Vec<Sent>,
        lease: Duration,
    ) -> Result<usize, Error> {
        let sent = Leased::Renew(subscription.to_owned(), sent, lease);
        self.lanes.sent.call(sent).await
    }

    async fn return_unsent(&self, subscription: &str, unsent: Vec<Unsent>) -> Result<usize, Error> {
        let back = Back::Unsent(subscription.to_owned(), unsent);
        self.lanes.take_back.call(back).await
    }

    async fn return_deliveries(
        &self,
        subscription: &str,
        returned: Vec<Returned>,
        counts: bool,
    ) -> Result<usize, Error> {
        let back = Back::Ended(subscription.to_owned(), returned, counts);
        self.lanes.take_back.call(back).await
    }

    async fn acknowledge(
        &self,
        subscription: &str,
        answers: Vec<Answer>,
    ) -> Result<Vec<AnswerOutcome>, Error> {
        self.lanes
            .acknowledge
            .call((subscription.to_owned(), answers))
            .await
    }

    async fn overdue(&self, subscription: &str, limit: usize) -> Result<Vec<Overdue>, Error> {
        let subscription = Arc::new(subscription.to_owned());
        self.readers
            .read("read overdue deliveries", move |db| {
                let subscription = Arc::clone(&subscription);
                Box::pin(async move { deliveries::overdue(db, &subscription, limit).await })
            })
            .await
    }

    async fn settle_overdue(
        &self,
        subscription: &str,
        decisions: Vec<(Overdue, OverdueDecision)>,
    ) -> Result<usize, Error> {
        let recovery = Recovery::Settle(subscription.to_owned(), decisions);
        self.lanes.recover.call(recovery).await
    }

    async fn expire(&self, subscription: &str, limit: usize) -> Result<usize, Error> {
        let recovery = Recovery::Expire(subscription.to_owned(), limit);
        self.lanes.recover.call(recovery).await
    }

    async fn open_buckets(&self, span: Duration) -> Result<(), Error> {
        self.lanes.retire.call(Wanted::Buckets(span)).await?;
        Ok(())
    }

    async fn retire(&self, cutoff: Timestamp) -> Result<Retired, Error> {
        self.lanes.retire.call(Wanted::Slice(cutoff)).await
    }

    async fn backlog_bytes(&self) -> Result<u64, Error> {
        self.readers
            .read("measure the backlog", |db| {
                Box::pin(console::backlog_bytes(db))
            })
            .await
    }

    async fn announce(&self, presence: Presence) -> Result<Heard, Error> {
        self.lanes.announce.call(Said::Here(presence)).await
    }

    async fn take_turn(&self, turn: TakeTurn) -> Result<Option<Duration>, Error> {
        self.lanes.turns.call(turn).await
    }

    async fn leave(&self, id: Uuid) -> Result<(), Error> {
        self.lanes.announce.call(Said::Gone(id)).await?;
        Ok(())
    }

    async fn replicas(&self) -> Result<Vec<ReplicaView>, Error> {
        self.people
            .read("list replicas", |db| Box::pin(replicas::replicas(db)))
            .await
    }

    async fn counts(&self) -> Result<Counts, Error> {
        self.people
            .read("count messages", |db| Box::pin(console::counts(db)))
            .await
    }

    async fn show(&self, id: MessageId, with_body: bool) -> Result<Option<Shown>, Error> {
        self.people
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
        self.people
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
        let wanted = Arc::new((subscription.map(str::to_owned), after));
        self.people
            .read("list deliveries", move |db| {
                let wanted = Arc::clone(&wanted);
                Box::pin(async move {
                    let (subscription, after) = (wanted.0.as_deref(), wanted.1.as_ref());
                    console::list_deliveries(db, state, subscription, after, limit).await
                })
            })
            .await
    }

    async fn close(&self) {
        let lanes = &self.lanes;
        // Each finishes what is queued; none waits for another.
        tokio::join!(
            lanes.apply.close(),
            lanes.prepare.close(),
            lanes.publish.close(),
            lanes.decide.close(),
            lanes.claim_checks.close(),
            lanes.settle_checks.close(),
            lanes.claim.close(),
            lanes.sent.close(),
            lanes.acknowledge.close(),
            lanes.take_back.close(),
            lanes.recover.close(),
            lanes.retire.close(),
            lanes.announce.close(),
            lanes.turns.close(),
        );
        tokio::join!(
            self.readers.close(),
            self.bodies.close(),
            self.people.close()
        );
        self.watch.abort();
    }
}

#[cfg(test)]
mod tests;
