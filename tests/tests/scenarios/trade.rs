//! Trades between two parties: a race of two workers, and notices in the wrong order.

use std::time::Duration;

use handfast_consumer::{
    Answer as Word, Consumer, Delivered, Guard, Handler, Transition, Tx, handfast,
};
use handfast_producer::{Message, Outcome, Producer, StatusServer};
use handfast_proto::v1::NewMessage;
use handfast_tests::books::{number, rows};
use handfast_tests::clients::{RawConsumer, message};
use handfast_tests::{Config, Party, World, eventually};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

const STATUS_PORT: u16 = 8001;
const SOON: Duration = Duration::from_secs(15);

async fn database(world: &World, name: &str, schema: &'static str) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(world.database_file(name))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(5));
    let pool = SqlitePool::connect_with(options).await.unwrap();
    sqlx::raw_sql(schema).execute(&pool).await.unwrap();
    pool
}

#[tokio::test]
async fn of_two_workers_with_one_trade_one_submits_it_and_the_other_learns_so() {
    let mut world = World::bare(Config::empty());
    world.config = world
        .config
        .clone()
        .producer("a", world.address(STATUS_PORT))
        .topic("trade")
        .subscription("b", "trade");
    world.start(Party::Service).await;
    let pool = database(
        &world,
        "a",
        "CREATE TABLE IF NOT EXISTS trade (name TEXT NOT NULL)",
    )
    .await;
    handfast_producer::migrate(&pool).await.unwrap();
    let status = StatusServer::new().fence(pool.clone());
    let address = world.address(STATUS_PORT);
    tokio::spawn(async move { status.serve(address, CancellationToken::new()).await });

    let mut submitted = 0;
    let mut learned = 0;
    for n in 0..10 {
        let worker = async || {
            let pool = database(&world, "a", "").await;
            let producer = Producer::connect(world.service_url(), "a").await.unwrap();
            let name = format!("trade-{n}");
            let trade = Message::new("trade")
                .key(&name)
                .payload("text/plain", name.clone());
            let done = producer
                .transact(&pool, trade, async |tx| {
                    sqlx::query("INSERT INTO trade (name) VALUES (?)")
                        .bind(&name)
                        .execute(&mut **tx)
                        .await
                        .map(drop)
                })
                .await;
            producer.drain().await;
            pool.close().await;
            done.unwrap()
        };
        for outcome in <[_; 2]>::from(tokio::join!(worker(), worker())) {
            match outcome {
                Outcome::Committed(()) => submitted += 1,
                Outcome::AlreadyCommitted => learned += 1,
            }
        }
    }
    assert_eq!((submitted, learned), (10, 10), "one of two, each time");
    let mut b = RawConsumer::open(world.deliveries(), "trade", "b", 100).await;
    let mut received = Vec::new();
    for _ in 0..10 {
        let trade = b.next().await;
        b.consumed(&trade).await;
        received.push(trade.payload);
    }
    received.sort();
    received.dedup();
    assert_eq!(received.len(), 10, "each trade once");
    assert_eq!(number(&pool, "SELECT count(*) FROM trade").await, 10);
    let books = world.drained().await;
    books.one_decision();
    let confirmed = books.messages.iter().filter(|m| m.state == "CONFIRMED");
    assert_eq!(confirmed.count(), 10);
}

/// Applies notices to a trade, and none before its turn.
struct Ledger(Guard);

impl Handler for Ledger {
    async fn handle(&self, tx: &mut Tx, notice: &Delivered) -> Word {
        let from = match notice.payload.as_ref() {
            b"paid" => "processing",
            _ => "paid",
        };
        let to = String::from_utf8_lossy(&notice.payload).into_owned();
        let moved = match self.0.transition(tx, "t-1", from, &to).await {
            Ok(moved) => moved,
            Err(error) => return Word::failed(error),
        };
        match moved {
            Transition::Applied => {
                let log = sqlx::query("INSERT INTO history (state) VALUES (?)");
                let logged = log.bind(to).execute(tx).await;
                logged.map_or_else(Word::failed, |_| Word::Consumed)
            }
            Transition::TooEarly => Word::Later(Duration::from_millis(200)),
            Transition::AlreadyApplied => Word::rejected("applied before, by another notice"),
            Transition::Refused(state) => Word::rejected(format!("the trade is {state}")),
        }
    }
}

#[tokio::test]
async fn a_refund_that_overtakes_its_payment_waits_and_is_then_applied() {
    let mut world = World::bare(
        Config::empty()
            .publisher("b")
            .topic("notice")
            .subscription("a", "notice"),
    );
    world.start(Party::Service).await;
    let pool = database(
        &world,
        "ledger",
        "CREATE TABLE trade (id TEXT PRIMARY KEY, state TEXT NOT NULL);
         CREATE TABLE history (step INTEGER PRIMARY KEY, state TEXT NOT NULL);
         INSERT INTO trade VALUES ('t-1', 'processing')",
    )
    .await;
    let guard = Guard::new("trade", "id", "state")
        .order(&["processing", "paid", "refunded"])
        .unwrap();
    let consumer = Consumer::connect(handfast(world.service_url()))
        .await
        .unwrap();
    let consumer = consumer.subscription("notice", "a").inbox(pool.clone());
    let _running = AbortOnDropHandle::new(tokio::spawn(async move {
        consumer.run(Ledger(guard), CancellationToken::new()).await
    }));

    let b = world.raw("b");
    let notice = |what: &str| NewMessage {
        payload: what.as_bytes().to_vec().into(),
        ..message("notice")
    };
    b.publish(&notice("refunded")).await;
    let laters = "SELECT count(*) FROM message_event WHERE kind = 'later'";
    let service = world.database("service").await;
    eventually("the refund came too early", SOON, async || {
        let laters = number(&service, laters).await;
        (laters > 0)
            .then_some(())
            .ok_or_else(|| "nobody said LATER".to_owned())
    })
    .await;
    service.close().await;
    let state: Vec<(String,)> = rows(&pool, "SELECT state FROM trade").await;
    assert_eq!(state[0].0, "processing", "nothing was skipped");

    b.publish(&notice("paid")).await;
    let books = world.drained().await;
    let history: Vec<(String,)> = rows(&pool, "SELECT state FROM history ORDER BY step").await;
    let history: Vec<_> = history.into_iter().map(|(state,)| state).collect();
    assert_eq!(history, ["paid", "refunded"]);
    assert!(
        books.deliveries.iter().all(|d| d.attempts == 0),
        "LATER does not count"
    );
}
