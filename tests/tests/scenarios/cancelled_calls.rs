//! Clients hang up in the middle of their calls.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use handfast_proto::v1::{MessageState, VerdictKind};
use handfast_tests::books::number;
use handfast_tests::clients::{RawConsumer, message};
use handfast_tests::status::{Behaviour, StatusStub};
use handfast_tests::{Config, Party, World};
use tokio::time::timeout;

const STATUS_PORT: u16 = 8001;
const CALLS: u64 = 1_000;

#[tokio::test]
async fn a_thousand_calls_that_are_cancelled_leave_nothing_half_done() {
    let mut world = World::bare(Config::empty());
    let status = world.address(STATUS_PORT);
    world.config = world
        .config
        .clone()
        .producer("hasty", status)
        .topic("fact")
        .subscription("sink", "fact");
    let says = Behaviour::Says(VerdictKind::RolledBack);
    let _status = StatusStub::start(status, says).await;
    world.start(Party::Service).await;
    let hasty = world.raw("hasty");
    assert_eq!(
        hasty.prepare(&message("fact")).await,
        Ok(MessageState::Prepared)
    );

    let calls = stream::iter(0..CALLS).map(|n| {
        let hasty = hasty.clone();
        async move {
            // From "not sent yet" to "just answered", in an order that is always the same.
            let patience = Duration::from_micros(n * 7_919 % 12_000);
            let fact = message("fact");
            let call = async {
                match n % 3 {
                    0 => drop(hasty.try_publish(&fact).await),
                    1 => drop(hasty.try_prepare(&fact).await),
                    _ => {
                        drop(hasty.try_prepare(&fact).await);
                        drop(hasty.confirm(&fact.id).await);
                    }
                }
            };
            timeout(patience, call).await.is_err()
        }
    });
    let cancelled: Vec<_> = calls.buffer_unordered(50).collect().await;
    let cancelled = cancelled.into_iter().filter(|cancelled| *cancelled).count();
    assert!(cancelled > 200, "only {cancelled} calls were cancelled");

    // No connection is left inside of a transaction: this would wait for it.
    let last = message("fact");
    let kept = timeout(Duration::from_secs(2), hasty.try_publish(&last)).await;
    assert_eq!(kept.expect("in time").unwrap(), Ok(MessageState::Confirmed));
    let db = world.database("service").await;
    let known = number(&db, "SELECT count(*) FROM message").await;
    assert!(known > 50, "only {known} calls arrived");
    let half = "SELECT count(*) FROM message m
         WHERE NOT EXISTS (SELECT 1 FROM body_1 b WHERE b.message_id = m.id)
            OR (m.state = 'CONFIRMED')
               <> EXISTS (SELECT 1 FROM delivery d WHERE d.message_id = m.id)";
    assert_eq!(number(&db, half).await, 0, "half-done");
    let orphans = "SELECT (SELECT count(*) FROM body_1 b
                            WHERE NOT EXISTS (SELECT 1 FROM message m WHERE m.id = b.message_id))
                        + (SELECT count(*) FROM delivery d
                            WHERE NOT EXISTS (SELECT 1 FROM message m WHERE m.id = d.message_id))";
    assert_eq!(number(&db, orphans).await, 0, "orphans");
    let confirmed = number(
        &db,
        "SELECT count(*) FROM message WHERE state = 'CONFIRMED'",
    )
    .await;
    db.close().await;

    let mut sink = RawConsumer::open(world.deliveries(), "fact", "sink", 10_000).await;
    for _ in 0..confirmed {
        let fact = sink.next().await;
        sink.consumed(&fact).await;
    }
    let books = world.drained().await;
    books.one_decision();
    assert!(
        books.decided("CANCELLED", "CHECK") > 0,
        "what nobody decided was asked about"
    );
}
