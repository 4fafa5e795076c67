//! A withdrawal is sent to the payout service (`src/bin/payout.rs`), and the answer times out.

use std::process::Command;
use std::time::Duration;

use handfast_fail_points::{ENVIRONMENT, Point};
use handfast_proto::v1::NewMessage;
use handfast_tests::clients::message;
use handfast_tests::database::{number, rows};
use handfast_tests::{Books, Config, Engines, Party, World, eventually, on_both_engines};
use tonic::Code;
use uuid::Uuid;

on_both_engines! {
    a_withdrawal_that_is_sent_again_after_a_time_out_is_paid_out_once,
    a_message_that_kills_its_consumer_ends_dead_and_its_neighbours_go_on,
}

const SOON: Duration = Duration::from_secs(30);
/// As long as a process needs that dies and is started again twelve times.
const DEATHS: Duration = Duration::from_secs(60);

pub(crate) fn world(engines: Engines, lines: &str) -> World {
    World::bare(
        engines,
        Config::empty()
            .publisher("bank")
            .topic("withdrawal")
            .subscription_with("payout", "withdrawal", lines),
    )
}

pub(crate) async fn payout(world: &World) -> Command {
    world.make_database("payout").await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_payout"));
    match world.engines() {
        Engines::Embedded => command.arg(world.service_url()),
        Engines::Production => command.args(<[String; 2]>::from(world.rabbitmq())),
    };
    command.arg(world.database_address("payout"));
    command
}

pub(crate) fn withdrawal(what: &str) -> NewMessage {
    NewMessage {
        key: Some(what.to_owned()),
        payload: what.as_bytes().to_vec().into(),
        ..message("withdrawal")
    }
}

async fn paid_out(world: &World, count: usize) -> Vec<String> {
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
        let all = found.len() >= count;
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

async fn a_message_that_kills_its_consumer_ends_dead_and_its_neighbours_go_on(engines: Engines) {
    const ATTEMPTS: i64 = 2;
    let lines = format!("attempts = {ATTEMPTS}\nschedule_ms = [300]");
    let mut world = world(engines, &lines);
    world.start(Party::Service).await;
    let bank = world.raw("bank");
    for n in 0..5 {
        bank.publish(&withdrawal(&format!("early {n}"))).await;
    }
    let poison = withdrawal("poison");
    bank.publish(&poison).await;
    let mut paid = 5;
    let mut deaths = 0;
    let start = payout(&world).await;
    world.spawn("payout", start);
    eventually("the poison is DEAD", DEATHS, async || {
        if !world.runs("payout") {
            world.aborted("payout").await;
            deaths += 1;
            let start = payout(&world).await;
            world.spawn("payout", start);
        }
        // Business goes on meanwhile, and all of it is a neighbour of the poison.
        bank.publish(&withdrawal(&format!("late {paid}"))).await;
        paid += 1;
        let books = world.books().await;
        let poison = delivery(&books, &poison);
        (poison.state == "DEAD")
            .then_some(())
            .ok_or_else(|| format!("{poison:?} after {deaths} deaths"))
    })
    .await;
    // It may come back five times, and that is one attempt.
    let per_attempt = match engines {
        Engines::Embedded => 5,
        Engines::Production => 6,
    };
    assert_eq!(
        deaths,
        per_attempt * ATTEMPTS,
        "the process died with each copy of it and with nothing else"
    );
    let found = paid_out(&world, paid).await;
    assert_eq!(found.len(), paid, "{found:?}");
    assert!(!found.contains(&"poison".to_owned()));
    let books = world.books().await;
    let poison = delivery(&books, &poison);
    assert_eq!(poison.attempts, ATTEMPTS);
    let reason = poison.last_error.as_deref().unwrap_or_default();
    assert!(!reason.is_empty(), "a person can read why");
    let consumed = books.deliveries.iter().filter(|d| d.state == "CONSUMED");
    let untroubled = consumed.filter(|d| d.attempts == 0).count();
    assert_eq!(untroubled, found.len(), "nobody else failed");
}

fn delivery<'a>(books: &'a Books, of: &NewMessage) -> &'a handfast_tests::books::Delivery {
    let mut found = books.deliveries.iter().filter(|d| d.message_id == of.id);
    let name = Uuid::from_slice(&of.id);
    found
        .next()
        .unwrap_or_else(|| panic!("{name:?} has no delivery"))
}
