//! What the tests of the passes stand on: a real store on a clock that is moved by hand, with
//! outages on request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tempfile::TempDir;
use uuid::Uuid;

use crate::broker::{AnswerState, Broker, BrokerState, Permit, QueueState};
use crate::clock::ManualClock;
use crate::message::{
    Answer, AnswerKind, CheckPolicy, DeliveryPolicy, DeliveryState, MessageId, NewMessage,
    Timestamp,
};
use crate::store::sqlite::SqliteStore;
use crate::store::*;
use crate::topology::{Producer, Snapshot, Subscription, Topic, Topology};

pub(crate) const TOPIC: &str = "payment.completed";
pub(crate) const ENDPOINT: &str = "http://payment";
pub(crate) const CHECK_AFTER: Duration = Duration::from_secs(10);
/// No test waits longer than this for what must happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) store: Arc<Unsteady>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) topology: Arc<Snapshot>,
    _folder: TempDir,
}

impl World {
    /// Payment produces for accounting and points.
    pub(crate) async fn new() -> Self {
        Self::with_policy(DeliveryPolicy {
            schedule: vec![Duration::from_secs(3)],
            ..DeliveryPolicy::default()
        })
        .await
    }

    pub(crate) async fn with_policy(policy: DeliveryPolicy) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(Timestamp::from_micros(
            1_700_000_000_000_000,
        )));
        let path = folder.path().join("handfast.db");
        let store = SqliteStore::open(&path, clock.clone(), 1).await.unwrap();
        let topology = topology(policy);
        store.apply_topology(topology.clone()).await.unwrap();
        Self {
            store: Arc::new(Unsteady {
                store,
                down: Mutex::default(),
                turn_is_anothers: AtomicBool::default(),
                turn_is_lost: AtomicBool::default(),
                calls: Mutex::default(),
            }),
            clock,
            topology: Arc::new(Snapshot::new(topology)),
            _folder: folder,
        }
    }

    pub(crate) async fn prepare(&self, numbers: impl IntoIterator<Item = u128>) {
        let messages = numbers.into_iter().map(message).collect();
        let written = self.store.prepare(messages, CHECK_AFTER).await.unwrap();
        assert!(written.items.iter().all(Result::is_ok));
    }

    pub(crate) async fn publish(&self, numbers: impl IntoIterator<Item = u128>) {
        let messages = numbers.into_iter().map(message).collect();
        let written = self.store.publish(messages, Handoff::none()).await.unwrap();
        assert!(written.items.iter().all(Result::is_ok));
    }

    pub(crate) async fn shown(&self, n: u128) -> Shown {
        self.store.show(id(n), false).await.unwrap().unwrap()
    }

    /// Accounting's delivery of message `n`.
    pub(crate) async fn delivery(&self, n: u128) -> DeliveryView {
        let deliveries = self.shown(n).await.deliveries;
        let mut of_accounting = deliveries
            .into_iter()
            .filter(|delivery| delivery.subscription == "accounting");
        of_accounting.next().unwrap()
    }

    /// Waits until accounting's delivery of message `n` is so.
    pub(crate) async fn until(&self, n: u128, so: impl Fn(&DeliveryView) -> bool) -> DeliveryView {
        let wait = async {
            loop {
                let delivery = self.delivery(n).await;
                if so(&delivery) {
                    return delivery;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap()
    }

    /// Accounting answers a send.
    pub(crate) async fn answer(&self, claim: &DeliveryClaim, kind: AnswerKind) -> AnswerOutcome {
        let answer = Answer {
            id: claim.id,
            generation: claim.generation,
            sent_at: Some(claim.sent_at),
            kind,
        };
        let outcomes = self.store.acknowledge("accounting", vec![answer]).await;
        outcomes.unwrap().remove(0)
    }
}

pub(crate) fn id(n: u128) -> MessageId {
    Uuid::from_u128(n).into()
}

pub(crate) fn message(n: u128) -> NewMessage {
    NewMessage {
        id: id(n),
        producer: "payment".to_owned(),
        topic: TOPIC.to_owned(),
        key: None,
        content_type: "application/json".to_owned(),
        headers: Vec::new(),
        payload: format!("{{\"n\":{n}}}").into_bytes(),
        deliver_after: None,
        fence: None,
    }
}

fn topology(policy: DeliveryPolicy) -> Topology {
    let producer = Producer {
        status_endpoint: Some(ENDPOINT.to_owned()),
        checks: CheckPolicy {
            check_after: CHECK_AFTER,
        },
    };
    let subscription = Subscription {
        topic: TOPIC.to_owned(),
        policy,
        max_in_queue: None,
        amqp_user: None,
    };
    Topology {
        version: 1,
        producers: BTreeMap::from([("payment".to_owned(), producer)]),
        topics: BTreeMap::from([(TOPIC.to_owned(), Topic::default())]),
        subscriptions: BTreeMap::from([
            ("accounting".to_owned(), subscription.clone()),
            ("points".to_owned(), subscription),
        ]),
    }
}

/// A broker that carries nothing: it remembers signals, and says what is gone.
#[derive(Default)]
pub(crate) struct Signals {
    pub(crate) due: Mutex<Vec<BTreeSet<String>>>,
    pub(crate) gone: Mutex<BTreeSet<MessageId>>,
    pub(crate) looked: Mutex<Vec<Due>>,
}

#[async_trait]
impl Broker for Signals {
    fn due(&self, topics: &BTreeSet<String>) {
        self.due.lock().unwrap().push(topics.clone());
    }

    fn look_at(&self, due: &Due) {
        self.looked.lock().unwrap().push(due.clone());
    }

    fn permit(&self, _: usize) -> Permit {
        Permit::none()
    }

    async fn hand_over(&self, _: Permit, _: Vec<Handed>) {}

    fn answered(&self, _: &str, _: &[MessageId]) {}

    fn heard(&self, _: &Heard) {}

    fn holds(&self) -> u64 {
        0
    }

    async fn is_gone(&self, _: &str, overdue: &[Overdue]) -> Vec<bool> {
        let gone = self.gone.lock().unwrap();
        overdue.iter().map(|row| gone.contains(&row.id)).collect()
    }

    fn consumers(&self, _: &str) -> Option<u32> {
        None
    }

    fn state(&self) -> BrokerState {
        BrokerState::Up
    }

    fn queue(&self, _subscription: &str) -> Option<QueueState> {
        None
    }

    fn answers(&self) -> AnswerState {
        AnswerState::default()
    }
}

/// A store whose methods fail as long as a test says so.
pub(crate) struct Unsteady {
    store: SqliteStore,
    down: Mutex<BTreeSet<&'static str>>,
    /// No turn can be taken.
    pub(crate) turn_is_anothers: AtomicBool,
    /// What was taken cannot be kept.
    pub(crate) turn_is_lost: AtomicBool,
    calls: Mutex<BTreeMap<&'static str, usize>>,
}

impl Unsteady {
    /// From now on these methods fail.
    pub(crate) fn fail(&self, methods: &[&'static str]) {
        self.down.lock().unwrap().extend(methods);
    }

    /// Everything works again.
    pub(crate) fn heal(&self) {
        self.down.lock().unwrap().clear();
    }

    /// How often a method was called.
    pub(crate) fn calls(&self, method: &str) -> usize {
        self.calls.lock().unwrap().get(method).copied().unwrap_or(0)
    }

    /// Waits until a method was called this often.
    pub(crate) async fn until_called(&self, method: &str, times: usize) {
        let wait = async {
            while self.calls(method) < times {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap();
    }

    fn enter(&self, method: &'static str) -> Result<(), Error> {
        *self.calls.lock().unwrap().entry(method).or_default() += 1;
        if self.down.lock().unwrap().contains(method) {
            return Err(Error::Busy {
                doing: "do that",
                why: "was told to fail",
            });
        }
        Ok(())
    }
}

macro_rules! passed_on {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $value:ty;)*) => {
        #[async_trait]
        impl Store for Unsteady {
            fn now(&self) -> Timestamp {
                self.store.now()
            }

            async fn close(&self) {
                self.store.close().await;
            }

            async fn take_turn(&self, turn: TakeTurn) -> Result<Option<Duration>, Error> {
                self.enter("take_turn")?;
                let another = match turn.again {
                    true => self.turn_is_lost.load(Ordering::SeqCst),
                    false => self.turn_is_anothers.load(Ordering::SeqCst),
                };
                Ok(another.then_some(turn.period))
            }

            $(async fn $name(&self, $($argument: $type),*) -> Result<$value, Error> {
                self.enter(stringify!($name))?;
                self.store.$name($($argument),*).await
            })*
        }
    };
}

passed_on! {
    fn apply_topology(topology: Topology) -> Applied;
    fn topology() -> Topology;
    fn removed_subscriptions() -> Vec<String>;
    fn prepare(messages: Vec<NewMessage>, check_after: Duration) -> Written;
    fn publish(messages: Vec<NewMessage>, handoff: Handoff) -> Written;
    fn decide(producer: &str, decisions: Vec<Decision>, handoff: Handoff) -> Written;
    fn get(
        producer: &str,
        ids: Vec<MessageId>
    ) -> Vec<Option<(MessageView, Vec<DeliveryView>)>>;
    fn undecided(producer: &str, most: u64) -> u64;
    fn due(subscriptions: BTreeSet<String>, producers: BTreeSet<String>) -> Due;
    fn claim_checks(producer: &str, limit: usize, lease: Duration) -> Vec<CheckClaim>;
    fn settle_checks(
        producer: &str,
        check_after: Duration,
        results: Vec<(CheckClaim, CheckResult)>
    ) -> (BTreeSet<String>, usize);
    fn check_now(id: MessageId) -> bool;
    fn claim_deliveries(subscription: &str, lane: Lane, lease: Duration) -> Claimed;
    fn load(handed: Vec<Handed>) -> Vec<Option<DeliveryClaim>>;
    fn mark_sent(subscription: &str, sent: Vec<Sent>, resend_after: Duration) -> usize;
    fn renew(subscription: &str, sent: Vec<Sent>, lease: Duration) -> usize;
    fn return_unsent(subscription: &str, unsent: Vec<Unsent>) -> usize;
    fn return_deliveries(subscription: &str, returned: Vec<Returned>, counts: bool) -> usize;
    fn acknowledge(subscription: &str, answers: Vec<Answer>) -> Vec<AnswerOutcome>;
    fn overdue(subscription: &str, limit: usize) -> Vec<Overdue>;
    fn settle_overdue(
        subscription: &str,
        decisions: Vec<(Overdue, OverdueDecision)>
    ) -> usize;
    fn expire(subscription: &str, limit: usize) -> usize;
    fn open_buckets(span: Duration) -> ();
    fn retire(cutoff: Timestamp) -> Retired;
    fn backlog_bytes() -> u64;
    fn announce(presence: Presence) -> Heard;
    fn leave(id: Uuid) -> ();
    fn replicas() -> Vec<ReplicaView>;
    fn counts() -> Counts;
    fn show(id: MessageId, with_body: bool) -> Option<Shown>;
    fn list_messages(
        filter: MessageFilter,
        after: Option<MessageId>,
        limit: usize
    ) -> Vec<MessageView>;
    fn list_deliveries(
        state: DeliveryState,
        subscription: Option<&str>,
        after: Option<DeliveryCursor>,
        limit: usize
    ) -> Vec<DeliveryView>;
}
