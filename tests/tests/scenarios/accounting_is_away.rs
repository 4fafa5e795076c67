//! Accounting is down while payments go on, and comes back.

use std::time::Duration;

use handfast_tests::clients::orders;
use handfast_tests::database::number;
use handfast_tests::{Books, Engines, Floor, Party, World, eventually, on_both_engines};

on_both_engines! {
    points_is_neither_delayed_nor_repeated_and_accounting_catches_up,
    a_consumer_that_stalls_gets_nothing_twice_once_it_goes_on,
    a_weekend_that_is_longer_than_every_step_of_the_schedule_costs_no_copies,
}

const DAY: Duration = Duration::from_secs(10);

async fn points_is_neither_delayed_nor_repeated_and_accounting_catches_up(engines: Engines) {
    let mut world = World::running(engines).await;
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

async fn a_consumer_that_stalls_gets_nothing_twice_once_it_goes_on(engines: Engines) {
    let mut world = World::running(engines).await;
    world.freeze(Party::Accounting);
    let (paid, _) = world.payments().pay_all(&orders("a", 50)).await;
    // Longer than the silence after which a delivery is looked at.
    let db = world.database("service").await;
    let overdue = format!(
        "SELECT count(*) FROM delivery WHERE subscription = 'accounting' AND state = 'SENT'
            AND sent_at < {}",
        db.ago(4_000)
    );
    eventually("accounting is long overdue", DAY, async || {
        let overdue = number(&db, &overdue).await;
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

async fn a_weekend_that_is_longer_than_every_step_of_the_schedule_costs_no_copies(
    engines: Engines,
) {
    // Less than 2 s of steps, and three attempts: a weekend of 10 s has time for all of them,
    // and for three times the silence after which a delivery is looked at.
    const WEEKEND_MS: i64 = 10_000;
    let mut world = World::new(engines).await;
    world.config = world.config_of_payment("attempts = 3\nschedule_ms = [300, 600, 900]");
    world.start_all().await;
    world.kill(Party::Accounting).await;
    let (paid, _) = world.payments().pay_all(&orders("friday", 100)).await;
    assert_eq!(paid, 80);
    let db = world.database("service").await;
    let young = format!(
        "SELECT count(*) FROM delivery WHERE confirmed_at > {}",
        db.ago(WEEKEND_MS)
    );
    eventually("it is Monday", DAY + DAY, async || {
        let young = number(&db, &young).await;
        (young == 0)
            .then_some(())
            .ok_or_else(|| format!("{young} are younger"))
    })
    .await;
    db.close().await;
    let books = world.books().await;
    assert_eq!((books.vouchers.len(), books.grants.len()), (0, 80));
    assert!(books.deliveries.iter().all(|d| d.attempts == 0));

    world.start(Party::Accounting).await;
    assert_eq!(
        world.payments().pay_all(&orders("monday", 10)).await,
        (8, 2)
    );
    let books = world.drained().await;
    books.hold(Floor {
        paid: 88,
        refused: 22,
        ..Floor::default()
    });
    assert!(books.deliveries.iter().all(|d| d.attempts == 0));
    assert_eq!(Books::copies(&books.seen_by_points), (88, 88));
    let (copies, messages) = Books::copies(&books.seen_by_accounting);
    assert_eq!(messages, 88);
    assert!(copies * 100 <= 88 * 105, "{copies} copies of 88 messages");
}
