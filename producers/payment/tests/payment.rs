//! One deduction per order, whatever is repeated, lost or unreachable.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

#[expect(dead_code, reason = "the SDK's tests use more of it than these")]
#[path = "../../sdk/tests/sdk/scripted.rs"]
mod scripted;

use std::sync::Arc;
use std::time::Duration;

use handfast_producer::proto::v1::MessageState;
use handfast_producer::proto::v1::business_status_client::BusinessStatusClient;
use handfast_producer::proto::v1::{CheckRequest, Question, VerdictKind};
use payment::client::*;
use payment::{Options, job, open_account, open_database, pay, serve, store};
use scripted::{Fault, PATIENCE, Scripted};
use sqlx::SqlitePool;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

struct World {
    handfast: Scripted,
    options: Options,
    client: PaymentClient<Channel>,
    status_url: String,
    pool: SqlitePool,
    running: JoinHandle<Result<(), payment::Error>>,
    stop: CancellationToken,
    _folder: TempDir,
}

impl World {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Options)) -> Self {
        let handfast = Scripted::start().await;
        let folder = tempfile::tempdir().unwrap();
        let mut options = Options {
            listen: "127.0.0.1:0".parse().unwrap(),
            status_listen: "127.0.0.1:0".parse().unwrap(),
            service: handfast.url.clone(),
            database: folder.path().join("payment.db"),
            insecure_listen: false,
            job_interval_ms: 3_600_000,
            pay_deadline_ms: 10_000,
        };
        change(&mut options);
        let pool = open_database(&options.database).await.unwrap();
        open_account(&pool, "ann", 1_000).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let status_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let status_url = format!("http://{}", status_listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let running = tokio::spawn(serve(
            options.clone(),
            listener,
            status_listener,
            stop.clone(),
        ));
        Self {
            handfast,
            client: PaymentClient::connect(url).await.unwrap(),
            status_url,
            options,
            pool,
            running,
            stop,
            _folder: folder,
        }
    }

    async fn pay(&self, order: &str, user: &str, amount: i64) -> Result<PayResponse, Status> {
        pay_with(self.client.clone(), order, user, amount).await
    }

    async fn get(&self, order: &str) -> Result<GetPaymentResponse, Status> {
        let request = GetPaymentRequest {
            caller: "shop".into(),
            order_id: order.into(),
        };
        let reply = self.client.clone().get_payment(request).await?;
        Ok(reply.into_inner())
    }

    async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    async fn balances(&self) -> (i64, i64) {
        (
            self.number("SELECT balance FROM account WHERE name = 'ann'")
                .await,
            self.number("SELECT coalesce(max(balance), 0) FROM account WHERE name = 'shop'")
                .await,
        )
    }

    async fn tries_and_done(&self) -> (i64, i64) {
        (
            self.number("SELECT count(*) FROM pay_try").await,
            self.number("SELECT count(*) FROM pay_done").await,
        )
    }

    /// A second set of hands on the same database, as another process would be.
    async fn other_payments(&self) -> pay::Payments {
        let store = store::Store::open(&self.options.database).await.unwrap();
        let producer = handfast_producer::Producer::connect(&self.handfast.url, "payment")
            .await
            .unwrap();
        pay::Payments::new(store, producer, Duration::from_secs(60))
    }
}

async fn pay_with(
    mut client: PaymentClient<Channel>,
    order: &str,
    user: &str,
    amount: i64,
) -> Result<PayResponse, Status> {
    let request = PayRequest {
        caller: "shop".into(),
        order_id: order.into(),
        user: user.into(),
        amount,
    };
    Ok(client.pay(request).await?.into_inner())
}

fn order(id: &str) -> store::Order {
    store::Order {
        caller: "shop".into(),
        order_id: id.into(),
    }
}

#[tokio::test]
async fn a_payment_moves_money_and_tells() {
    let world = World::new().await;
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Paid);
    assert_eq!(world.balances().await, (700, 300));
    assert_eq!(world.tries_and_done().await, (1, 1));
    let state = world.handfast.state();
    let kept = &state.messages[&state.prepared[0]];
    assert_eq!(kept.state, MessageState::Confirmed);
    assert_eq!(kept.message.topic, "payment.completed");
    assert_eq!(kept.message.key.as_deref(), Some("shop/1"));
    let payload: serde_json::Value = serde_json::from_slice(&kept.message.payload).unwrap();
    assert_eq!(
        payload,
        serde_json::json!({"caller": "shop", "order_id": "1", "user": "ann", "amount": 300})
    );
}

#[tokio::test]
async fn twenty_equal_requests_at_once_deduct_once() {
    let world = World::new().await;
    let mut calls = JoinSet::new();
    for _ in 0..20 {
        let client = world.client.clone();
        calls.spawn(async move { pay_with(client, "1", "ann", 300).await });
    }
    for paid in calls.join_all().await {
        assert_eq!(paid.unwrap().status(), PaymentStatus::Paid);
    }
    assert_eq!(world.balances().await, (700, 300));
    assert_eq!(world.tries_and_done().await, (1, 1));
    assert_eq!(world.number("SELECT count(*) FROM payment").await, 1);
    assert_eq!(world.handfast.states(), [MessageState::Confirmed]);
}

#[tokio::test]
async fn two_processes_with_the_same_order_deduct_once() {
    let world = World::new().await;
    let other = world.other_payments().await;
    let payment = other.accept(&order("1"), "ann", 300).await.unwrap();
    assert_eq!(payment.state, store::State::Paying);
    // The other process's in-memory locks know nothing of this one's.
    let (here, there) = tokio::join!(world.pay("1", "ann", 300), async {
        other.finish(&order("1")).await
    });
    assert_eq!(here.unwrap().status(), PaymentStatus::Paid);
    assert_eq!(there.unwrap(), store::State::Paid);
    assert_eq!(world.balances().await, (700, 300));
    assert_eq!(world.tries_and_done().await.1, 1);
}

#[tokio::test]
async fn another_amount_or_user_for_the_same_order_is_a_conflict() {
    let world = World::new().await;
    world.pay("1", "ann", 300).await.unwrap();
    for (user, amount) in [("ann", 301), ("bob", 300)] {
        let refused = world.pay("1", user, amount).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists);
    }
    assert_eq!(world.balances().await, (700, 300));
}

#[tokio::test]
async fn too_small_a_balance_is_refused_and_stays_refused() {
    let world = World::new().await;
    for _ in 0..2 {
        let refused = world.pay("1", "ann", 1_001).await.unwrap();
        assert_eq!(refused.status(), PaymentStatus::Refused);
        assert_eq!(refused.reason, "insufficient balance");
    }
    let refused = world.pay("2", "nobody", 1).await.unwrap();
    assert_eq!(refused.status(), PaymentStatus::Refused);
    assert_eq!(world.balances().await, (1_000, 0));
    // The second request was answered from what is stored.
    assert_eq!(world.tries_and_done().await, (2, 0));
    assert_eq!(world.handfast.states(), [MessageState::Cancelled; 2]);
}

#[tokio::test]
async fn what_became_of_a_payment_can_be_asked() {
    let world = World::new().await;
    assert_eq!(world.get("1").await.unwrap_err().code(), Code::NotFound);
    world.pay("1", "ann", 300).await.unwrap();
    let payment = world.get("1").await.unwrap();
    assert_eq!(payment.status(), PaymentStatus::Paid);
    assert_eq!((payment.user.as_str(), payment.amount), ("ann", 300));
}

#[tokio::test]
async fn an_unreachable_handfast_is_processing_and_the_job_finishes_it() {
    let world = World::with(|options| {
        options.pay_deadline_ms = 200;
        options.job_interval_ms = 50;
    })
    .await;
    world
        .handfast
        .script("prepare", vec![Fault::Fail(Code::Unavailable); 4]);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    let finished = async {
        while world.get("1").await.unwrap().status() != PaymentStatus::Paid {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, finished).await.unwrap();
    assert_eq!(world.balances().await, (700, 300));
    assert_eq!(world.tries_and_done().await.1, 1);
}

#[tokio::test]
async fn a_slow_payment_is_processing_and_goes_on() {
    let world = World::with(|options| options.pay_deadline_ms = 100).await;
    let go = Arc::new(Notify::new());
    world.handfast.script("confirm", [Fault::Wait(go.clone())]);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    go.notify_one();
    let again = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(again.status(), PaymentStatus::Paid);
    assert_eq!(world.balances().await, (700, 300));
}

#[tokio::test]
async fn a_key_that_another_try_holds_is_processing() {
    let world = World::with(|options| options.pay_deadline_ms = 200).await;
    let holder = world
        .handfast
        .hold("payment.completed", "shop/1", MessageState::Prepared);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    world.handfast.set(holder, MessageState::Cancelled);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Paid);
}

#[tokio::test]
async fn a_job_that_is_started_twice_takes_each_payment_once() {
    let world = World::new().await;
    for id in 0..10 {
        sqlx::query(
            "INSERT INTO payment (caller, order_id, user, amount, state, created_at, updated_at, due_at)
             VALUES ('shop', ?, 'ann', 10, 'PAYING', 0, 0, 0)",
        )
        .bind(format!("{id}"))
        .execute(&world.pool)
        .await
        .unwrap();
    }
    let jobs = [world.other_payments().await, world.other_payments().await];
    let (one, two) = tokio::join!(job::run_once(&jobs[0]), job::run_once(&jobs[1]));
    assert_eq!(one.unwrap() + two.unwrap(), 10);
    assert_eq!(world.tries_and_done().await, (10, 10));
    assert_eq!(world.balances().await, (900, 100));
    assert_eq!(job::run_once(&jobs[0]).await.unwrap(), 0);
}

#[tokio::test]
async fn malformed_requests_name_their_field() {
    let world = World::new().await;
    let long = "x".repeat(101);
    for (order, user, amount) in [
        ("1", "ann", 0),
        ("1", "ann", -1),
        ("", "ann", 1),
        ("1", "", 1),
        ("1", "a\0", 1),
        (&long, "ann", 1),
    ] {
        let refused = world.pay(order, user, amount).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let bad = tonic_types::StatusExt::get_details_bad_request(&refused).unwrap();
        assert_eq!(bad.field_violations.len(), 1);
    }
    assert_eq!(world.number("SELECT count(*) FROM payment").await, 0);
}

#[tokio::test]
async fn a_status_check_is_answered_from_the_same_database() {
    let world = World::new().await;
    world.pay("1", "ann", 300).await.unwrap();
    let now = world
        .number("SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER)")
        .await;
    let message = {
        let state = world.handfast.state();
        state.messages[&state.prepared[0]].message.clone()
    };
    let question = Question {
        message_id: message.id,
        topic: message.topic,
        key: message.key,
        fence: message.fence,
        prepared_at: now,
    };
    let mut status = BusinessStatusClient::connect(world.status_url.clone())
        .await
        .unwrap();
    let questions = vec![question];
    let reply = status.check(CheckRequest { questions }).await.unwrap();
    assert_eq!(
        reply.into_inner().verdicts[0].kind(),
        VerdictKind::Committed
    );
}

#[tokio::test]
async fn a_shutdown_answers_what_is_in_flight() {
    let world = World::new().await;
    let go = Arc::new(Notify::new());
    world.handfast.script("prepare", [Fault::Wait(go.clone())]);
    let client = world.client.clone();
    let paying = tokio::spawn(async move { pay_with(client, "1", "ann", 300).await });
    world
        .handfast
        .until("a prepare", |state| !state.calls.is_empty())
        .await;
    world.stop.cancel();
    go.notify_one();
    let paid = paying.await.unwrap().unwrap();
    assert_eq!(paid.status(), PaymentStatus::Paid);
    tokio::time::timeout(PATIENCE, world.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(world.handfast.states(), [MessageState::Confirmed]);
}

#[tokio::test]
async fn what_cannot_be_opened_or_listened_on_is_one_line() {
    let world = World::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cases = [
        Options {
            database: "/nowhere/at/all/payment.db".into(),
            ..world.options.clone()
        },
        Options {
            listen: taken.local_addr().unwrap(),
            ..world.options.clone()
        },
        Options {
            listen: "0.0.0.0:0".parse().unwrap(),
            ..world.options.clone()
        },
        Options {
            service: "not an address".into(),
            ..world.options.clone()
        },
    ];
    for options in cases {
        let error = payment::run(options, CancellationToken::new())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("cannot "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
