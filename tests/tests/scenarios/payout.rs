//! A withdrawal is sent to the payout service (`src/bin/payout.rs`), and the answer times out.

use std::process::Command;
use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, Tx};
use handfast_fail_points::{ENVIRONMENT, Point};
use handfast_proto::v1::{NewMessage, PublishRequest};
use handfast_tests::clients::message;
use handfast_tests::database::{number, rows};
use handfast_tests::{
    Books, Config, Engines, Own, Party, Schema, World, eventually, on_both_engines,
};
use nix::sys::signal::Signal;
use tonic::Code;
use uuid::Uuid;

on_both_engines! {
    a_withdrawal_that_is_sent_again_after_a_time_out_is_paid_out_once,
}

const SOON: Duration = Duration::from_secs(30);

fn world(engines: Engines, lines: &str) -> World {
    World::bare(
        engines,
        Config::empty()
            .publisher("bank")
            .topic("withdrawal")
            .subscription_with("payout", "withdrawal", lines),
    )
}

async fn payout(world: &World) -> Command {
    world.make_database("payout").await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_payout"));
    match world.engines() {
        Engines::Embedded => command.arg(world.service_url()),
        Engines::Production => command.args(<[String; 2]>::from(world.rabbitmq())),
    };
    command.arg(world.database_address("payout"));
    command
}

fn withdrawal(what: &str) -> NewMessage {
    NewMessage {
        key: Some(what.to_owned()),
        payload: what.as_bytes().to_vec().into(),
        ..message("withdrawal")
    }
}

async fn paid_out(world: &World, count: i64) -> Vec<String> {
    eventually(format!("{count} payouts"), SOON, async || {
        if !world.has_inbox("payout").await {
            return Err("no database".to_owned());
        }
        let books = world.books().await;
        if let Some(open) = books.unfinished() {
            return Err(open);
        }
        let db = world.database("payout").await;
        let found: Vec<(String,)> = rows(&db, "SELECT what FROM payout ORDER BY what").await;
        db.close().await;
        let found: Vec<_> = found.into_iter().map(|(what,)| what).collect();
        let all = i64::try_from(found.len()).unwrap() >= count;
        all.then_some(found.clone())
            .ok_or_else(|| format!("{found:?}"))
    })
    .await
}

async fn a_withdrawal_that_is_sent_again_after_a_time_out_is_paid_out_once(engines: Engines) {
    let mut world = world(engines, "schedule_ms = [3000]");
    world.start(Party::Service).await;
    let bank = world.raw("bank");
    let first = withdrawal("100 to ada");
    // The connection is made before the service stops to answer.
    bank.publish(&withdrawal("1 to bob")).await;
    world.freeze(Party::Service);
    let waiting = bank.try_publish(&first);
    let timed_out = tokio::time::timeout(Duration::from_millis(500), waiting).await;
    assert!(timed_out.is_err(), "there is no answer: {timed_out:?}");
    world.thaw(Party::Service);
    // The caller does not know, so it sends the same again.
    bank.publish(&first).await;
    bank.publish(&first).await;
    // A careless caller, who makes a new id, is stopped by the key.
    let careless = bank.try_publish(&withdrawal("100 to ada")).await.unwrap();
    assert_eq!(careless.unwrap_err().code, Code::AlreadyExists);

    let mut command = payout(&world).await;
    // It pays out, and dies before it can say so.
    command.env(
        ENVIRONMENT,
        format!("{}=abort@1", Point::CONSUMER_AFTER_COMMIT),
    );
    world.spawn("payout", command);
    world.aborted("payout").await;
    let again = payout(&world).await;
    world.spawn("payout", again);
    let paid = paid_out(&world, 2).await;
    assert_eq!(paid, ["1 to bob", "100 to ada"], "once each");
    let db = world.database("payout").await;
    let copies = number(&db, "SELECT CAST(sum(seen) AS bigint) FROM handfast_inbox").await;
    db.close().await;
    assert!(
        copies >= 3,
        "the one that was not answered came again: {copies}"
    );
    let books = world.books().await;
    books.one_decision();
    assert_eq!(books.messages.len(), 2);
}

/// On the embedded broker, which knows whom each stream of it held: RabbitMQ counts every
/// redelivery against the neighbours too, and drops them together.
#[tokio::test]
async fn a_message_that_kills_its_consumer_ends_dead_and_its_neighbours_go_on() {
    let mut world = world(Engines::Embedded, "attempts = 1\nschedule_ms = [300]");
    world.start(Party::Service).await;
    let bank = world.raw("bank");
    for n in 0..5 {
        bank.publish(&withdrawal(&format!("early {n}"))).await;
    }
    let poison = withdrawal("poison");
    bank.publish(&poison).await;
    for n in 0..5 {
        bank.publish(&withdrawal(&format!("late {n}"))).await;
    }
    let mut deaths = 0;
    let start = payout(&world).await;
    world.spawn("payout", start);
    eventually("the poison is DEAD", SOON, async || {
        if !world.runs("payout") {
            world.aborted("payout").await;
            deaths += 1;
            let start = payout(&world).await;
            world.spawn("payout", start);
        }
        let books = world.books().await;
        let poison = delivery(&books, &poison);
        (poison.state == "DEAD")
            .then_some(())
            .ok_or_else(|| format!("{poison:?} after {deaths} deaths"))
    })
    .await;
    // Five streams that ended with it count as one failure.
    assert_eq!(
        deaths, 5,
        "the process died with each send of it and with no other"
    );
    let paid = paid_out(&world, 10).await;
    assert_eq!(paid.len(), 10, "{paid:?}");
    assert!(!paid.contains(&"poison".to_owned()));
    let books = world.books().await;
    let poison = delivery(&books, &poison);
    assert_eq!(poison.attempts, 1);
    let reason = poison.last_error.as_deref().unwrap_or_default();
    assert!(!reason.is_empty(), "a person can read why");
    let consumed = books.deliveries.iter().filter(|d| d.state == "CONSUMED");
    let untroubled = consumed.filter(|d| d.attempts == 0).count();
    assert_eq!(untroubled, 10, "nobody else failed");
}

fn delivery<'a>(books: &'a Books, of: &NewMessage) -> &'a handfast_tests::books::Delivery {
    let mut found = books.deliveries.iter().filter(|d| d.message_id == of.id);
    let name = Uuid::from_slice(&of.id);
    found
        .next()
        .unwrap_or_else(|| panic!("{name:?} has no delivery"))
}

/// Four at a time.
const WORK_MS: u32 = 200;
const CAPACITY_PER_S: u32 = 20;
/// 80 % of it.
const LOAD_PER_S: u32 = 16;
const STALL: Duration = Duration::from_secs(20);

/// Publishes at the rate of [`LOAD_PER_S`] for so long.
async fn load(world: &World, time: Duration) {
    const PER_S: u32 = 4;
    let mut tick = tokio::time::interval(Duration::from_secs(1) / PER_S);
    for _ in 0..time.as_millis() * u128::from(PER_S) / 1_000 {
        tick.tick().await;
        let request = PublishRequest {
            producer: "bank".to_owned(),
            messages: (0..LOAD_PER_S / PER_S)
                .map(|_| withdrawal(&Uuid::now_v7().to_string()))
                .collect(),
        };
        let published = world.messages().publish(request).await;
        published.expect("a publish is answered");
    }
}

/// On RabbitMQ only: SQLite has one writer, so that its consumer's capacity is another.
#[tokio::test]
async fn a_stall_at_four_fifths_of_its_capacity_costs_no_copies() {
    let mut world = World::bare(
        Engines::Production,
        Config::empty()
            .publisher("bank")
            .topic("withdrawal")
            .subscription("payout", "withdrawal")
            .subscription("archive", "withdrawal"),
    );
    world.start(Party::Service).await;
    let archive = world.own_database("archive", KEPT).await;
    let _archiving = world
        .consume("withdrawal", "archive", &archive, Archive)
        .await;
    let mut command = payout(&world).await;
    command
        .env("PAYOUT_WORK_MS", WORK_MS.to_string())
        // As little of its work as 200 are of that of a quick consumer: what it holds comes back
        // when RabbitMQ hangs up on it, and is then worked on one by one.
        .env("PAYOUT_PREFETCH", "8");
    world.spawn("payout", command);

    load(&world, Duration::from_secs(3)).await;
    world.process("payout").signal(Signal::SIGSTOP);
    load(&world, STALL).await;
    world.process("payout").signal(Signal::SIGCONT);
    load(&world, Duration::from_secs(2)).await;

    let books = world.drained().await;
    books.one_decision();
    let total = i64::from(LOAD_PER_S) * 25;
    assert_eq!(i64::try_from(books.messages.len()).unwrap(), total);
    for delivery in &books.deliveries {
        assert_eq!(
            (delivery.state.as_str(), delivery.attempts),
            ("CONSUMED", 0)
        );
        let took = delivery.answered_at.unwrap() - delivery.confirmed_at;
        if delivery.subscription == "archive" {
            assert!(took < 3_000_000, "the archive waited {took} µs");
        }
    }
    let waited = books
        .deliveries
        .iter()
        .filter(|d| d.answered_at.unwrap() - d.confirmed_at > 10_000_000);
    assert!(
        waited.count() >= CAPACITY_PER_S as usize,
        "the stall was felt"
    );
    let db = world.database("payout").await;
    let effects = number(&db, "SELECT count(*) FROM payout").await;
    assert_eq!(effects, total, "once each");
    let copies = number(&db, "SELECT CAST(sum(seen) AS bigint) FROM handfast_inbox").await;
    eprintln!("{copies} copies of {total} messages");
    assert!(
        copies * 100 <= total * 105,
        "{copies} copies of {total} messages"
    );
}

const KEPT: Schema =
    Schema::both("CREATE TABLE kept (message_id bytea NOT NULL, what text NOT NULL)");

/// Keeps everything, at once.
struct Archive;

impl<D: Own> BatchHandler<D> for Archive {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        const KEEP: &str = "INSERT INTO kept (message_id, what) VALUES ($1, $2)";
        let mut answers = Vec::new();
        for message in messages {
            let kept = D::write(tx, KEEP, message.message_id, &message.topic).await;
            answers.push(kept.map_or_else(Answer::failed, |()| Answer::Consumed));
        }
        answers
    }
}
