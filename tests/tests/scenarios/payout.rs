//! A withdrawal is sent to the payout service (`src/bin/payout.rs`), and the answer times out.

use std::process::Command;
use std::time::Duration;

use handfast_fail_points::{ENVIRONMENT, Point};
use handfast_proto::v1::NewMessage;
use handfast_tests::books::{number, rows};
use handfast_tests::clients::message;
use handfast_tests::{Books, Config, Party, World, eventually};
use tonic::Code;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(30);

fn world(lines: &str) -> World {
    World::bare(
        Config::empty()
            .publisher("bank")
            .topic("withdrawal")
            .subscription_with("payout", "withdrawal", lines),
    )
}

fn payout(world: &World) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_payout"));
    command
        .arg(world.service_url())
        .arg(world.database_file("payout"));
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
    let file = world.database_file("payout");
    eventually(format!("{count} payouts"), SOON, async || {
        if !file.exists() {
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

#[tokio::test]
async fn a_withdrawal_that_is_sent_again_after_a_time_out_is_paid_out_once() {
    let mut world = world("schedule_ms = [3000]");
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

    let mut command = payout(&world);
    // It pays out, and dies before it can say so.
    command.env(
        ENVIRONMENT,
        format!("{}=abort@1", Point::CONSUMER_AFTER_COMMIT),
    );
    world.spawn("payout", command);
    world.aborted("payout").await;
    let again = payout(&world);
    world.spawn("payout", again);
    let paid = paid_out(&world, 2).await;
    assert_eq!(paid, ["1 to bob", "100 to ada"], "once each");
    let db = world.database("payout").await;
    let copies = number(&db, "SELECT sum(seen) FROM handfast_inbox").await;
    db.close().await;
    assert!(
        copies >= 3,
        "the one that was not answered came again: {copies}"
    );
    let books = world.books().await;
    books.one_decision();
    assert_eq!(books.messages.len(), 2);
}

#[tokio::test]
async fn a_message_that_kills_its_consumer_ends_dead_and_its_neighbours_go_on() {
    let mut world = world("attempts = 1\nschedule_ms = [300]");
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
    let start = payout(&world);
    world.spawn("payout", start);
    eventually("the poison is DEAD", SOON, async || {
        if !world.runs("payout") {
            world.aborted("payout").await;
            deaths += 1;
            let start = payout(&world);
            world.spawn("payout", start);
        }
        let books = world.books().await;
        let poison = delivery(&books, &poison);
        (poison.state == "DEAD")
            .then_some(())
            .ok_or_else(|| format!("{poison:?}"))
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
    let others = books.deliveries.iter().filter(|d| d.state == "CONSUMED");
    assert_eq!(
        others.filter(|d| d.attempts == 0).count(),
        10,
        "nobody else failed"
    );
}

fn delivery<'a>(books: &'a Books, of: &NewMessage) -> &'a handfast_tests::books::Delivery {
    let mut found = books.deliveries.iter().filter(|d| d.message_id == of.id);
    let name = Uuid::from_slice(&of.id);
    found
        .next()
        .unwrap_or_else(|| panic!("{name:?} has no delivery"))
}
