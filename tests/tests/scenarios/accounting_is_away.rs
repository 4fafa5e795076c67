//! Accounting is down while payments go on, and comes back.

use std::time::Duration;

use handfast_tests::clients::orders;
use handfast_tests::{Books, Floor, Party, World, eventually};

const DAY: Duration = Duration::from_secs(10);

#[tokio::test]
async fn points_is_neither_delayed_nor_repeated_and_accounting_catches_up() {
    let mut world = World::running().await;
    assert_eq!(
        world.payments().pay_all(&orders("before", 10)).await,
        (8, 2)
    );
    world.drained().await;
    world.kill(Party::Accounting).await;

    let (paid, _) = world.payments().pay_all(&orders("during", 100)).await;
    assert_eq!(paid, 80);
    let books = eventually("points has rewarded every payment", DAY, async || {
        let books = world.books().await;
        let grants = books.grants.len();
        (grants == 88)
            .then_some(books)
            .ok_or_else(|| format!("{grants} of 88"))
    })
    .await;
    assert_eq!(books.vouchers.len(), 8, "accounting is down");
    let slowest = books.done.iter().map(|done| {
        let mut grants = books.grants.iter();
        let grant = grants.find(|grant| grant.message_id == done.message_id);
        grant.expect("its grant").at - done.at
    });
    let slowest = slowest.max().expect("payments");
    assert!(slowest < 3_000_000, "a reward took {slowest} µs");
    for waiting in books
        .deliveries
        .iter()
        .filter(|d| d.subscription == "accounting")
    {
        assert_eq!(waiting.attempts, 0, "being down is no failure: {waiting:?}");
        assert_ne!(waiting.state, "DEAD");
    }

    world.start(Party::Accounting).await;
    let books = world.drained().await;
    books.hold(Floor {
        paid: 88,
        refused: 22,
        ..Floor::default()
    });
    assert_eq!(
        Books::copies(&books.seen_by_points),
        (88, 88),
        "never repeated"
    );
    let (copies, messages) = Books::copies(&books.seen_by_accounting);
    assert_eq!(messages, 88);
    assert!(copies * 100 < 88 * 105, "{copies} copies of 88 messages");
}

#[tokio::test]
async fn a_consumer_that_stalls_gets_nothing_twice_once_it_goes_on() {
    let mut world = World::running().await;
    world.freeze(Party::Accounting);
    let (paid, _) = world.payments().pay_all(&orders("a", 50)).await;
    // Longer than the silence after which a delivery is looked at.
    let overdue = "SELECT count(*) FROM delivery WHERE subscription = 'accounting'
        AND state = 'SENT'
        AND sent_at + 4000000 < CAST(unixepoch('subsec') * 1000000 AS INTEGER)";
    let db = world.database("service").await;
    eventually("accounting is long overdue", DAY, async || {
        let overdue = handfast_tests::books::number(&db, overdue).await;
        (overdue > 0)
            .then_some(())
            .ok_or_else(|| "it is not".to_owned())
    })
    .await;
    db.close().await;
    world.thaw(Party::Accounting);

    let books = world.drained().await;
    books.hold(Floor {
        paid,
        ..Floor::default()
    });
    assert_eq!(Books::copies(&books.seen_by_points), (40, 40));
    let (copies, messages) = Books::copies(&books.seen_by_accounting);
    assert!(
        copies * 100 < 40 * 105,
        "{copies} copies of {messages} messages"
    );
    assert!(
        books
            .deliveries
            .iter()
            .all(|delivery| delivery.attempts == 0)
    );
}
