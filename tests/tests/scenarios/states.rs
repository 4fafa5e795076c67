//! Two companies and a trade: two workers that submit it at once, notices that overtake each
//! other, and a user who does not wait for the whole chain.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, Guard, Transition, Tx};
use handfast_producer::{Message, Outcome, Producer, StatusServer, TransactError};
use handfast_proto::v1::NewMessage;
use handfast_tests::clients::{Order, message, orders};
use handfast_tests::database::{number, rows};
use handfast_tests::{
    Books, Config, Consuming, Database, Engines, Floor, Own, Party, Schema, World, eventually,
    in_either, on_both_engines,
};
use payment::client::PaymentStatus;
use tokio::sync::{Barrier, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

on_both_engines! {
    of_two_workers_that_submit_the_same_trade_one_does_and_the_other_learns_of_it,
    a_worker_that_comes_while_the_other_is_at_it_neither_submits_nor_takes_it_for_refused,
    a_refund_that_overtakes_its_payment_is_applied_after_it,
    notices_that_overtake_the_trade_itself_wait_for_it,
    a_notice_that_comes_too_late_is_kept_for_a_person_and_changes_nothing,
    who_pays_is_told_so_while_accounting_and_points_are_down,
    a_payment_that_cannot_be_decided_yet_is_processing_and_can_be_watched,
}

const PATIENCE: Duration = Duration::from_secs(30);
const STATUS_PORT: u16 = 8411;
const SUBMITTED: &str = "trade.submitted";
const NOTICE: &str = "trade.notice";

// === Two workers submit the same trade ===

const TRADES: Schema =
    Schema::both("CREATE TABLE IF NOT EXISTS trade (name text NOT NULL, worker text NOT NULL)");
const RECEIVED: Schema =
    Schema::both("CREATE TABLE received (message_id bytea NOT NULL, name text NOT NULL)");
const RECEIVE: &str = "INSERT INTO received (message_id, name) VALUES ($1, $2)";

/// B: writes down what A submits.
struct Receiver;

impl<D: Own> BatchHandler<D> for Receiver {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            let name = message.key.as_deref().expect("a key");
            let received = D::write(tx, RECEIVE, message.message_id, name).await;
            answers.push(received.map_or_else(Answer::failed, |_| Answer::Consumed));
        }
        answers
    }
}

struct TwoCompanies {
    world: World,
    /// B's database.
    received: Database,
    _b: Consuming,
    _status: AbortOnDropHandle<()>,
}

/// A worker of A with a connection to the service and a pool of its own.
struct Worker {
    name: &'static str,
    producer: Producer,
    pool: Database,
}

impl TwoCompanies {
    async fn start(engines: Engines) -> Self {
        let mut world = World::bare(engines, Config::empty());
        world.config = Config::empty()
            .producer("a", world.address(STATUS_PORT))
            .topic(SUBMITTED)
            .subscription("b", SUBMITTED);
        world.start(Party::Service).await;
        let pool = world.own_database("a", TRADES).await;
        let server = in_either!(pool, pool => {
            handfast_producer::migrate(&pool).await.expect("a fence");
            StatusServer::new().fence(pool)
        });
        let serving = server.serve(world.address(STATUS_PORT), CancellationToken::new());
        let status = tokio::spawn(async move { serving.await.expect("A answers checks") });
        let received = world.own_database("b", RECEIVED).await;
        let b = world.consume(SUBMITTED, "b", &received, Receiver).await;
        Self {
            world,
            received,
            _b: b,
            _status: AbortOnDropHandle::new(status),
        }
    }

    async fn worker(&self, name: &'static str) -> Worker {
        let producer = Producer::connect(self.world.service_url(), "a").await;
        Worker {
            name,
            producer: producer.expect("an address"),
            pool: self.world.own_database("a", TRADES).await,
        }
    }

    /// Who submitted which trade, by A's database.
    async fn submitted(&self) -> BTreeMap<String, String> {
        let db = self.world.database("a").await;
        let all: Vec<(String, String)> = rows(&db, "SELECT name, worker FROM trade").await;
        db.close().await;
        let count = all.len();
        let submitted = BTreeMap::from_iter(all);
        assert_eq!(submitted.len(), count, "a trade was submitted twice");
        submitted
    }

    /// After everything is finished: B has each of the trades once.
    async fn received_once(&self, trades: usize) -> Books {
        let books = self.world.drained().await;
        books.one_decision();
        let confirmed = books.messages.iter().filter(|m| m.state == "CONFIRMED");
        assert_eq!(confirmed.count(), trades);
        assert!(books.deliveries.iter().all(|d| d.state == "CONSUMED"));
        let trades = i64::try_from(trades).expect("a count");
        for (what, sql) in [
            ("received", "SELECT count(*) FROM received"),
            ("different", "SELECT count(DISTINCT name) FROM received"),
            (
                "seen",
                "SELECT CAST(sum(seen) AS bigint) FROM handfast_inbox",
            ),
        ] {
            assert_eq!(number(&self.received, sql).await, trades, "{what} by B");
        }
        let db = self.world.database("a").await;
        let committed = "SELECT count(*) FROM handfast_fence WHERE verdict = 'COMMITTED'";
        assert_eq!(number(&db, committed).await, trades, "by A's fence");
        db.close().await;
        books
    }
}

impl Worker {
    /// Submits a trade; inside of the transaction, `meanwhile` happens.
    async fn submits(
        &self,
        trade: &str,
        meanwhile: impl Future<Output = ()>,
    ) -> Result<Outcome<()>, TransactError<sqlx::Error>> {
        let message = Message::new(SUBMITTED).key(trade);
        in_either!(&self.pool, pool => {
            self.producer
                .transact(pool, message, async |tx| {
                    sqlx::query("INSERT INTO trade (name, worker) VALUES ($1, $2)")
                        .bind(trade)
                        .bind(self.name)
                        .execute(&mut **tx)
                        .await?;
                    meanwhile.await;
                    Ok(())
                })
                .await
        })
    }
}

async fn of_two_workers_that_submit_the_same_trade_one_does_and_the_other_learns_of_it(
    engines: Engines,
) {
    const TRADES: usize = 25;
    let companies = TwoCompanies::start(engines).await;
    let line = Arc::new(Barrier::new(2));
    let mut racing = Vec::new();
    for name in ["anna", "bert"] {
        let worker = companies.worker(name).await;
        let line = Arc::clone(&line);
        racing.push(tokio::spawn(async move {
            let mut done = Vec::new();
            for trade in 0..TRADES {
                line.wait().await;
                let trade = format!("trade {trade}");
                let outcome = worker.submits(&trade, async {}).await;
                done.push(outcome.expect("one does it, the other waits"));
            }
            worker.producer.drain().await;
            done
        }));
    }
    let mut outcomes = Vec::new();
    for worker in racing {
        outcomes.push(worker.await.expect("the worker lives"));
    }
    let submitted = companies.submitted().await;
    assert_eq!(submitted.len(), TRADES);
    for (trade, (anna, bert)) in outcomes[0].iter().zip(&outcomes[1]).enumerate() {
        let by = match (anna, bert) {
            (Outcome::Committed(()), Outcome::AlreadyCommitted) => "anna",
            (Outcome::AlreadyCommitted, Outcome::Committed(())) => "bert",
            other => panic!("trade {trade}: {other:?}"),
        };
        assert_eq!(submitted[&format!("trade {trade}")], by);
    }
    companies.received_once(TRADES).await;
}

async fn a_worker_that_comes_while_the_other_is_at_it_neither_submits_nor_takes_it_for_refused(
    engines: Engines,
) {
    let companies = TwoCompanies::start(engines).await;
    let anna = companies.worker("anna").await;
    let mut bert = companies.worker("bert").await;
    let (at_it, is_at_it) = oneshot::channel();
    let (go_on, may_go_on) = oneshot::channel();
    let annas = tokio::spawn(async move {
        let held = async {
            at_it.send(()).expect("the test waits");
            may_go_on.await.expect("the test says when");
        };
        let outcome = anna.submits("trade 1", held).await;
        anna.producer.drain().await;
        outcome
    });
    is_at_it.await.expect("anna is in her transaction");

    bert.producer = bert.producer.with_deadline(Duration::from_millis(1_500));
    let undecided = bert.submits("trade 1", async {}).await;
    let Err(TransactError::HolderUndecided { holder }) = undecided else {
        panic!("{undecided:?}");
    };
    let books = companies.world.books().await;
    assert_eq!(books.messages.len(), 1, "the second left nothing behind");
    assert_eq!(books.messages[0].id, holder.as_bytes());
    assert_eq!(books.messages[0].state, "PREPARED", "no check decided it");
    assert_eq!(companies.submitted().await.len(), 0);

    go_on.send(()).expect("anna waits");
    let annas = annas.await.expect("anna lives");
    assert!(matches!(annas, Ok(Outcome::Committed(()))), "{annas:?}");
    let berts = bert.submits("trade 1", async {}).await;
    assert!(matches!(berts, Ok(Outcome::AlreadyCommitted)), "{berts:?}");
    let submitted = companies.submitted().await;
    assert_eq!(submitted["trade 1"], "anna");
    let books = companies.received_once(1).await;
    assert_eq!(books.messages.len(), 1);
}

// === The reverse comes first ===

/// A's trades. Whatever changes a state, the database itself writes the change down.
const STATES: Schema = Schema {
    sqlite: "
        CREATE TABLE trade (name TEXT NOT NULL PRIMARY KEY, state TEXT NOT NULL);
        CREATE TABLE history (
            step INTEGER PRIMARY KEY, name TEXT NOT NULL, before TEXT NOT NULL,
            after TEXT NOT NULL);
        CREATE TRIGGER written_down AFTER UPDATE OF state ON trade BEGIN
            INSERT INTO history (name, before, after) VALUES (new.name, old.state, new.state);
        END;",
    postgres: "
        CREATE TABLE trade (name text NOT NULL PRIMARY KEY, state text NOT NULL);
        CREATE TABLE history (
            step bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL,
            before text NOT NULL, after text NOT NULL);
        CREATE FUNCTION write_down() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO history (name, before, after) VALUES (new.name, old.state, new.state);
            RETURN NULL;
        END $$;
        CREATE TRIGGER written_down AFTER UPDATE OF state ON trade
            FOR EACH ROW EXECUTE FUNCTION write_down();",
};

/// A: applies B's notices, which say `<trade>/<paid|refunded>`.
struct Notices(Guard);

impl Notices {
    async fn apply<D: Own>(&self, tx: &mut Tx<D>, notice: &Delivered) -> Answer {
        let said = String::from_utf8(notice.payload.to_vec()).expect("text");
        let (trade, to) = said.split_once('/').expect("trade and state");
        let from = if to == "paid" { "processing" } else { "paid" };
        match self.0.transition(tx, trade, from, to).await {
            Ok(Transition::Applied) => Answer::Consumed,
            Ok(Transition::TooEarly) => Answer::Later(Duration::from_millis(150)),
            Ok(Transition::AlreadyApplied) => Answer::rejected("it is so already"),
            Ok(Transition::Refused(state)) => Answer::rejected(format!("the trade is {state}")),
            Err(error) => Answer::failed(error),
        }
    }
}

impl<D: Own> BatchHandler<D> for Notices {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            answers.push(self.apply::<D>(tx, message).await);
        }
        answers
    }
}

struct Settlement {
    world: World,
    pool: Database,
    _a: Consuming,
}

impl Settlement {
    async fn start(engines: Engines) -> Self {
        let config = Config::empty()
            .publisher("b")
            .topic(NOTICE)
            .subscription_with("a", NOTICE, "schedule_ms = [300]");
        let mut world = World::bare(engines, config);
        world.start(Party::Service).await;
        let pool = world.own_database("a", STATES).await;
        let order = ["processing", "paid", "refunded"];
        let guard = Guard::new("trade", "name", "state").order(&order);
        let notices = Notices(guard.expect("three states"));
        let a = world.consume(NOTICE, "a", &pool, notices).await;
        Self { world, pool, _a: a }
    }

    async fn submits(&self, trade: &str) {
        let sql = format!("INSERT INTO trade (name, state) VALUES ('{trade}', 'processing')");
        self.pool.run(&sql).await;
    }

    /// B tells A, in its own time.
    async fn notifies(&self, trade: &str, state: &str) -> Vec<u8> {
        let notice = NewMessage {
            payload: format!("{trade}/{state}").into_bytes().into(),
            ..message(NOTICE)
        };
        self.world.raw("b").publish(&notice).await;
        notice.id
    }

    /// Waits until the service was told this often that this notice came too early. What the
    /// handler saw does not tell: of notices that come together it sees each twice.
    async fn until_early(&self, id: &[u8], times: i64) {
        eventually("the notice is early", PATIENCE, async || {
            let told = self.laters(id).await;
            (told >= times).then_some(()).ok_or(told.to_string())
        })
        .await;
    }

    async fn state(&self, trade: &str) -> String {
        let states: BTreeMap<String, String> =
            BTreeMap::from_iter(rows::<(String, String)>(&self.pool, "SELECT * FROM trade").await);
        states[trade].clone()
    }

    /// The changes of a trade's state, in order.
    async fn history(&self, trade: &str) -> Vec<(String, String)> {
        let sql = format!("SELECT before, after FROM history WHERE name = '{trade}' ORDER BY step");
        rows(&self.pool, &sql).await
    }

    /// How often the service was told LATER about this message.
    async fn laters(&self, id: &[u8]) -> i64 {
        let db = self.world.database("service").await;
        let all: Vec<(Vec<u8>,)> = rows(
            &db,
            "SELECT message_id FROM message_event WHERE kind = 'later'",
        )
        .await;
        db.close().await;
        let laters = all.iter().filter(|(message,)| message == id).count();
        i64::try_from(laters).expect("a count")
    }

    /// Waits until everything is answered for good.
    async fn settled(&self) -> Books {
        let books = self.world.drained().await;
        books.one_decision();
        books
    }
}

/// processing → paid → refunded.
fn step_by_step() -> Vec<(String, String)> {
    [("processing", "paid"), ("paid", "refunded")]
        .map(|(before, after)| (before.to_owned(), after.to_owned()))
        .to_vec()
}

async fn a_refund_that_overtakes_its_payment_is_applied_after_it(engines: Engines) {
    let settlement = Settlement::start(engines).await;
    let trades: Vec<_> = (0..6).map(|n| format!("t{n}")).collect();
    let mut refunds = Vec::new();
    for trade in &trades {
        settlement.submits(trade).await;
        refunds.push(settlement.notifies(trade, "refunded").await);
    }
    for (trade, refund) in trades.iter().zip(&refunds) {
        settlement.until_early(refund, 2).await;
        assert_eq!(
            settlement.state(trade).await,
            "processing",
            "nothing jumped"
        );
    }
    let mut payments = Vec::new();
    for trade in &trades {
        payments.push(settlement.notifies(trade, "paid").await);
    }

    let books = settlement.settled().await;
    for trade in &trades {
        assert_eq!(settlement.history(trade).await, step_by_step(), "{trade}");
        assert_eq!(settlement.state(trade).await, "refunded");
    }
    assert_eq!(books.deliveries.len(), 2 * trades.len());
    for delivery in &books.deliveries {
        assert_eq!(delivery.state, "CONSUMED", "{delivery:?}");
        assert_eq!(delivery.attempts, 0, "LATER does not count: {delivery:?}");
    }
    for id in &payments {
        assert_eq!(settlement.laters(id).await, 0, "its turn had come");
    }
    let inbox = number(&settlement.pool, "SELECT count(*) FROM handfast_inbox").await;
    assert_eq!(inbox, 12);
}

async fn notices_that_overtake_the_trade_itself_wait_for_it(engines: Engines) {
    let settlement = Settlement::start(engines).await;
    let refund = settlement.notifies("t1", "refunded").await;
    let payment = settlement.notifies("t1", "paid").await;
    settlement.until_early(&refund, 1).await;
    settlement.until_early(&payment, 1).await;
    settlement.submits("t1").await;

    let books = settlement.settled().await;
    assert_eq!(settlement.history("t1").await, step_by_step());
    assert!(books.deliveries.iter().all(|d| d.state == "CONSUMED"));
}

async fn a_notice_that_comes_too_late_is_kept_for_a_person_and_changes_nothing(engines: Engines) {
    let settlement = Settlement::start(engines).await;
    settlement.submits("t1").await;
    settlement.notifies("t1", "paid").await;
    settlement.settled().await;
    settlement.notifies("t1", "refunded").await;
    settlement.settled().await;
    // B says both once more, as facts of their own.
    let late = [
        (
            settlement.notifies("t1", "paid").await,
            "the trade is refunded",
        ),
        (
            settlement.notifies("t1", "refunded").await,
            "it is so already",
        ),
    ];

    let books = settlement.settled().await;
    for (id, reason) in &late {
        let delivery = books.deliveries.iter().find(|d| d.message_id == *id);
        let delivery = delivery.expect("a delivery");
        assert_eq!(delivery.state, "DEAD");
        let expected = format!("rejected: {reason}");
        assert_eq!(delivery.last_error.as_ref(), Some(&expected));
    }
    assert_eq!(settlement.history("t1").await, step_by_step());
    assert_eq!(settlement.state("t1").await, "refunded");
}

// === The user does not wait ===

async fn who_pays_is_told_so_while_accounting_and_points_are_down(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    world.start(Party::Payment).await;
    let payments = world.payments();
    let all = orders("a", 10);
    for order in &all {
        let told = payments.asks(order).await.expect("an answer");
        let expected = match order.user.as_str() {
            "ada" => PaymentStatus::Paid,
            _ => PaymentStatus::Refused,
        };
        assert_eq!(
            told.status(),
            expected,
            "{order:?}: at the first time of asking"
        );
        let found = payments.looks_up(order).await.expect("an answer");
        assert_eq!(found.status(), expected);
        assert_eq!(
            (found.user, found.amount),
            (order.user.clone(), order.amount)
        );
    }
    let unknown = payments.looks_up(&Order::new("never asked for")).await;
    assert_eq!(unknown.expect_err("nobody asked").code(), Code::NotFound);

    let books = world.books().await;
    assert_eq!((books.done.len(), books.deliveries.len()), (8, 16));
    for delivery in &books.deliveries {
        let waits = match engines {
            Engines::Embedded => delivery.state == "PENDING" && delivery.generation == 0,
            // In RabbitMQ, or on its way there.
            Engines::Production => ["PENDING", "SENT"].contains(&delivery.state.as_str()),
        };
        assert!(waits, "it waits for its consumer: {delivery:?}");
        assert_eq!(delivery.attempts, 0);
    }
    assert!(!world.has_inbox("accounting").await, "it was never up");

    world.start_all().await;
    world.drained().await.hold(Floor {
        paid: 8,
        refused: 2,
        ..Floor::default()
    });
}

async fn a_payment_that_cannot_be_decided_yet_is_processing_and_can_be_watched(engines: Engines) {
    let mut world = World::new(engines).await;
    world.pay_deadline_ms = 500;
    // Without the message service nothing can be promised to accounting, so nothing is paid.
    world.start(Party::Payment).await;
    let payments = world.payments();
    let order = Order::new("a-1");
    let told = payments.asks(&order).await.expect("an answer");
    assert_eq!(told.status(), PaymentStatus::Processing);
    let found = payments.looks_up(&order).await.expect("an answer");
    assert_eq!(found.status(), PaymentStatus::Processing);
    let books = world.books().await;
    assert_eq!(books.payments[0].state, "PAYING");
    assert_eq!(books.done.len(), 0);

    world.start(Party::Service).await;
    eventually(
        "it is paid without being asked again",
        PATIENCE,
        async || {
            let found = payments.looks_up(&order).await.expect("an answer");
            match found.status() {
                PaymentStatus::Paid => Ok(()),
                PaymentStatus::Processing => Err("PROCESSING".to_owned()),
                other => panic!("{other:?}"),
            }
        },
    )
    .await;
    world.start_all().await;
    world.drained().await.hold(Floor {
        paid: 1,
        ..Floor::default()
    });
}
