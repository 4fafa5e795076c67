//! A consumer stalls for two minutes at four fifths of its capacity, with the timers that a
//! service has when nobody sets them. With resends on time alone, every message that waits would
//! be sent again and again, and what was two minutes late would be late for hours.
//!
//! On RabbitMQ only: SQLite has one writer, so that a consumer's capacity there is another.

use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, Tx};
use handfast_proto::v1::PublishRequest;
use handfast_tests::database::number;
use handfast_tests::{Config, Engines, Own, Party, Schema, World};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::payout::{payout, withdrawal};

/// Of one withdrawal; four are worked on at the same time.
const WORK_MS: u32 = 36;
/// With the transaction around the work.
const CAPACITY_PER_S: u32 = 100;
const LOAD_PER_S: u32 = CAPACITY_PER_S * 4 / 5;
const BEFORE: Duration = Duration::from_secs(5);
const STALL: Duration = Duration::from_secs(120);
const AFTER: Duration = Duration::from_secs(5);
/// What came during the stall is worked off in less time than the stall took, if nothing comes
/// twice.
const DRAIN: Duration = Duration::from_secs(150);

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

/// Publishes at the rate of [`LOAD_PER_S`] for so long, and says how many.
async fn load(world: &World, time: Duration) -> i64 {
    const PER_S: u32 = 4;
    let ticks = time.as_secs() * u64::from(PER_S);
    let per_tick = LOAD_PER_S / PER_S;
    let mut tick = tokio::time::interval(Duration::from_secs(1) / PER_S);
    for _ in 0..ticks {
        tick.tick().await;
        let request = PublishRequest {
            producer: "bank".to_owned(),
            messages: (0..per_tick)
                .map(|_| withdrawal(&Uuid::now_v7().to_string()))
                .collect(),
        };
        let published = world.messages().publish(request).await;
        published.expect("a publish is answered");
    }
    i64::try_from(ticks * u64::from(per_tick)).unwrap()
}

#[tokio::test]
async fn a_stall_of_two_minutes_at_four_fifths_of_its_capacity_costs_no_copies() {
    let mut world = World::bare(
        Engines::Production,
        Config::with_usual_timers()
            .publisher("bank")
            .topic("withdrawal")
            .usual_subscription("payout", "withdrawal")
            .usual_subscription("archive", "withdrawal"),
    );
    world.start(Party::Service).await;
    let archive = world.own_database("archive", KEPT).await;
    let _archiving = world
        .consume("withdrawal", "archive", &archive, Archive)
        .await;
    let mut command = payout(&world).await;
    command.env("PAYOUT_WORK_MS", WORK_MS.to_string());
    world.spawn("payout", command);

    let mut total = load(&world, BEFORE).await;
    world.process("payout").signal(Signal::SIGSTOP);
    let stalled = load(&world, STALL).await;
    world.process("payout").signal(Signal::SIGCONT);
    total += stalled + load(&world, AFTER).await;

    world.until_all_consumed(DRAIN).await;

    let books = world.books().await;
    books.one_decision();
    assert_eq!(i64::try_from(books.messages.len()).unwrap(), total);
    assert!(books.deliveries.iter().all(|d| d.attempts == 0));
    let (archived, paid_out): (Vec<_>, Vec<_>) = books
        .deliveries
        .iter()
        .map(|d| (d, d.answered_at.unwrap() - d.confirmed_at))
        .partition(|(d, _)| d.subscription == "archive");
    let slowest = archived.iter().map(|(_, took)| took).max().unwrap();
    assert!(*slowest < 3_000_000, "the archive waited {slowest} µs");
    let late = paid_out.iter().filter(|(_, took)| *took > 60_000_000);
    let late = i64::try_from(late.count()).unwrap();
    assert!(late * 3 > stalled, "only {late} were late: no stall");

    let seen = "SELECT CAST(sum(seen) AS bigint) FROM handfast_inbox";
    assert_eq!(number(&archive, seen).await, total, "nothing came twice");
    let db = world.database("payout").await;
    let effects = number(&db, "SELECT count(*) FROM payout").await;
    assert_eq!(effects, total, "once each");
    let copies = number(&db, seen).await;
    let again = books.deliveries.iter().filter(|d| d.generation > 1).count();
    eprintln!("{copies} copies of {total} messages; {again} were sent again, the others came back");
    assert!(
        copies * 100 <= total * 105,
        "{copies} copies of {total} messages"
    );
}
