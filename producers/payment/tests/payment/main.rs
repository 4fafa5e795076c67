//! One deduction per order, whatever is repeated, lost or unreachable.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

mod database;
mod hung;
#[expect(dead_code, reason = "the SDK's tests use more of it than these")]
#[path = "../../../sdk/tests/sdk/postgres/proxy.rs"]
mod proxy;
#[expect(dead_code, reason = "the SDK's tests use more of it than these")]
#[path = "../../../sdk/tests/sdk/scripted.rs"]
mod scripted;

use std::sync::Arc;
use std::time::Duration;

use database::{Kind, on_every_database};
use handfast_producer::proto::v1::MessageState;
use handfast_producer::proto::v1::business_status_client::BusinessStatusClient;
use handfast_producer::proto::v1::{CheckRequest, Question, VerdictKind};
use handfast_scratch::Scratch;
use payment::client::*;
use payment::{Database, Options, job, open_accounts, pay, serve, store};
use scripted::{Fault, PATIENCE, Scripted};
use sqlx::{Pool, Postgres};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

struct World<D: Kind> {
    handfast: Scripted,
    options: Options,
    client: PaymentClient<Channel>,
    status_url: String,
    pool: Pool<D>,
    running: JoinHandle<Result<(), payment::Error>>,
    stop: CancellationToken,
    home: D::Home,
}

impl<D: Kind> World<D> {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Options)) -> Self {
        let handfast = Scripted::start().await;
        let home = D::home().await;
        let mut options = Options {
            listen: "127.0.0.1:0".parse().unwrap(),
            status_listen: "127.0.0.1:0".parse().unwrap(),
            service: handfast.url.clone(),
            database: D::database(&home),
            insecure_listen: false,
            job_interval_ms: 3_600_000,
            pay_deadline_ms: 10_000,
        };
        change(&mut options);
        let ann = [("ann".to_owned(), 1_000)];
        open_accounts(&options.database, ann).await.unwrap();
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
            pool: D::pool(&home),
            running,
            stop,
            home,
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
        D::number(&self.pool, sql).await
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
    async fn other_payments(&self) -> pay::Payments<D::Store> {
        let store = D::store(&self.home).await;
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

on_every_database! {
    a_payment_moves_money_and_tells,
    twenty_equal_requests_at_once_deduct_once,
    two_processes_with_the_same_order_deduct_once,
    another_amount_or_user_for_the_same_order_is_a_conflict,
    too_small_a_balance_is_refused_and_stays_refused,
    what_became_of_a_payment_can_be_asked,
    an_unreachable_handfast_is_processing_and_the_job_finishes_it,
    a_slow_payment_is_processing_and_goes_on,
    a_key_that_another_try_holds_is_processing,
    a_job_that_is_started_twice_takes_each_payment_once,
    malformed_requests_name_their_field,
    a_status_check_is_answered_from_the_same_database,
    a_shutdown_answers_what_is_in_flight,
    what_cannot_be_opened_or_listened_on_is_one_line,
    those_who_pay_each_other_do_not_wait_for_each_other,
}

async fn a_payment_moves_money_and_tells<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn twenty_equal_requests_at_once_deduct_once<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn two_processes_with_the_same_order_deduct_once<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn another_amount_or_user_for_the_same_order_is_a_conflict<D: Kind>() {
    let world = World::<D>::new().await;
    world.pay("1", "ann", 300).await.unwrap();
    for (user, amount) in [("ann", 301), ("bob", 300)] {
        let refused = world.pay("1", user, amount).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists);
    }
    assert_eq!(world.balances().await, (700, 300));
}

async fn too_small_a_balance_is_refused_and_stays_refused<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn what_became_of_a_payment_can_be_asked<D: Kind>() {
    let world = World::<D>::new().await;
    assert_eq!(world.get("1").await.unwrap_err().code(), Code::NotFound);
    world.pay("1", "ann", 300).await.unwrap();
    let payment = world.get("1").await.unwrap();
    assert_eq!(payment.status(), PaymentStatus::Paid);
    assert_eq!((payment.user.as_str(), payment.amount), ("ann", 300));
}

async fn an_unreachable_handfast_is_processing_and_the_job_finishes_it<D: Kind>() {
    let world = World::<D>::with(|options| {
        options.pay_deadline_ms = 200;
        options.job_interval_ms = 50;
    })
    .await;
    // More failures than any back-off gets through before the deadline.
    world
        .handfast
        .script("prepare", vec![Fault::Fail(Code::Unavailable); 10_000]);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    world.handfast.state().faults.remove("prepare");
    let finished = async {
        while world.get("1").await.unwrap().status() != PaymentStatus::Paid {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, finished).await.unwrap();
    assert_eq!(world.balances().await, (700, 300));
    assert_eq!(world.tries_and_done().await.1, 1);
}

async fn a_slow_payment_is_processing_and_goes_on<D: Kind>() {
    let world = World::<D>::with(|options| options.pay_deadline_ms = 100).await;
    let go = Arc::new(Notify::new());
    world.handfast.script("confirm", [Fault::Wait(go.clone())]);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    go.notify_one();
    let again = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(again.status(), PaymentStatus::Paid);
    assert_eq!(world.balances().await, (700, 300));
}

async fn a_key_that_another_try_holds_is_processing<D: Kind>() {
    let world = World::<D>::with(|options| options.pay_deadline_ms = 200).await;
    let holder = world
        .handfast
        .hold("payment.completed", "shop/1", MessageState::Prepared);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Processing);
    world.handfast.set(holder, MessageState::Cancelled);
    let paid = world.pay("1", "ann", 300).await.unwrap();
    assert_eq!(paid.status(), PaymentStatus::Paid);
}

async fn a_job_that_is_started_twice_takes_each_payment_once<D: Kind>() {
    let world = World::<D>::new().await;
    for id in 0..10 {
        let sql = format!(
            r#"INSERT INTO payment
                   (caller, order_id, "user", amount, state, created_at, updated_at, due_at)
               VALUES ('shop', '{id}', 'ann', 10, 'PAYING', 0, 0, 0)"#
        );
        D::run(&world.pool, sql).await;
    }
    let jobs = [world.other_payments().await, world.other_payments().await];
    let (one, two) = tokio::join!(job::run_once(&jobs[0]), job::run_once(&jobs[1]));
    assert_eq!(one.unwrap() + two.unwrap(), 10);
    assert_eq!(world.tries_and_done().await, (10, 10));
    assert_eq!(world.balances().await, (900, 100));
    assert_eq!(job::run_once(&jobs[0]).await.unwrap(), 0);
}

async fn malformed_requests_name_their_field<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn a_status_check_is_answered_from_the_same_database<D: Kind>() {
    let world = World::<D>::new().await;
    world.pay("1", "ann", 300).await.unwrap();
    let now = D::now_us(&world.pool).await.unwrap();
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

async fn a_shutdown_answers_what_is_in_flight<D: Kind>() {
    let world = World::<D>::new().await;
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

async fn what_cannot_be_opened_or_listened_on_is_one_line<D: Kind>() {
    let world = World::<D>::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cases = [
        Options {
            database: D::nowhere(&world.home),
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

async fn those_who_pay_each_other_do_not_wait_for_each_other<D: Kind>() {
    let world = World::<D>::new().await;
    let both = ["bob", "eve"].map(|name| (name.to_owned(), 1_000));
    open_accounts(&world.options.database, both).await.unwrap();
    let payments = world.other_payments().await;
    let mut work = JoinSet::new();
    for id in 0..40 {
        let (caller, user) = if id % 2 == 0 {
            ("bob", "eve")
        } else {
            ("eve", "bob")
        };
        let order = store::Order {
            caller: caller.into(),
            order_id: format!("{id}"),
        };
        let payments = payments.clone();
        work.spawn(async move {
            payments.accept(&order, user, 10).await.unwrap();
            payments.finish(&order).await.unwrap()
        });
    }
    for state in work.join_all().await {
        assert_eq!(state, store::State::Paid);
    }
    let sum = "SELECT CAST(sum(balance) AS bigint) FROM account WHERE name IN ('bob', 'eve')";
    assert_eq!(world.number(sum).await, 2_000);
    assert_eq!(world.tries_and_done().await, (40, 40));
}

/// Carries connections to a server from an address where nobody listened before.
async fn carry(listener: TcpListener, server: (String, u16)) {
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(server.clone()).await.unwrap();
        tokio::spawn(async move {
            // Either side may go away at any time.
            drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
        });
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let handfast = Scripted::start().await;
    let scratch = Scratch::create().await;
    let ann = [("ann".to_owned(), 1_000)];
    let database = <Postgres as Kind>::database(&scratch);
    open_accounts(&database, ann).await.unwrap();

    let reserved = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let away = scratch.options().host("127.0.0.1").port(address.port());
    let options = Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        status_listen: "127.0.0.1:0".parse().unwrap(),
        service: handfast.url.clone(),
        database: Database::Server(Box::new(away)),
        insecure_listen: false,
        job_interval_ms: 3_600_000,
        pay_deadline_ms: 10_000,
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let status_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let running = tokio::spawn(serve(options, listener, status_listener, stop.clone()));
    let client = PaymentClient::connect(url).await.unwrap();
    let paying = tokio::spawn(async move { pay_with(client, "1", "ann", 300).await });
    assert!(!running.is_finished());

    let listener = TcpListener::bind(address).await.unwrap();
    let (host, port) = (
        scratch.options().get_host().to_owned(),
        scratch.options().get_port(),
    );
    tokio::spawn(carry(listener, (host, port)));
    let paid = tokio::time::timeout(PATIENCE, paying).await.unwrap();
    assert_eq!(paid.unwrap().unwrap().status(), PaymentStatus::Paid);
    stop.cancel();
    let ended = tokio::time::timeout(PATIENCE, running).await.unwrap();
    ended.unwrap().unwrap();
}
