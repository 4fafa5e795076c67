//! The state guard on a program's own table.

use std::sync::Arc;
use std::time::Duration;

use handfast_consumer::{Answer, Delivered, Guard, GuardError, Handler, Transition, Tx};
use handfast_proto::v1::AnswerKind;
use sqlx::{Connection as _, SqliteConnection};

use crate::common::World;

fn orders() -> Guard {
    Guard::new("shop_order", "id", "state")
        .order(&["processing", "paid", "refunded"])
        .unwrap()
}

async fn shop(state: &str) -> SqliteConnection {
    let mut db = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    sqlx::raw_sql("CREATE TABLE shop_order (id INTEGER PRIMARY KEY, state TEXT NOT NULL)")
        .execute(&mut db)
        .await
        .unwrap();
    sqlx::query("INSERT INTO shop_order VALUES (1, ?), (2, 'processing')")
        .bind(state)
        .execute(&mut db)
        .await
        .unwrap();
    db
}

async fn state(db: &mut SqliteConnection, id: i64) -> String {
    sqlx::query_scalar("SELECT state FROM shop_order WHERE id = ?")
        .bind(id)
        .fetch_one(db)
        .await
        .unwrap()
}

#[tokio::test]
async fn every_case_has_its_own_answer() {
    let refused = |state: &str| Transition::Refused(state.to_owned());
    let cases = [
        ("processing", "processing", "paid", Transition::Applied),
        ("paid", "processing", "paid", Transition::AlreadyApplied),
        ("refunded", "processing", "paid", refused("refunded")),
        ("closed", "processing", "paid", refused("closed")),
        ("processing", "paid", "refunded", Transition::TooEarly),
        ("paid", "paid", "refunded", Transition::Applied),
        ("refunded", "paid", "refunded", Transition::AlreadyApplied),
        ("closed", "paid", "refunded", refused("closed")),
        ("paid", "processing", "refunded", refused("paid")),
    ];
    for (current, from, to, expected) in cases {
        let mut db = shop(current).await;
        let became = orders().transition(&mut db, 1, from, to).await.unwrap();
        assert_eq!(became, expected, "{current}: {from} to {to}");
        let wanted = if expected == Transition::Applied {
            to
        } else {
            current
        };
        assert_eq!(state(&mut db, 1).await, wanted);
        assert_eq!(state(&mut db, 2).await, "processing", "another row");
    }
}

#[tokio::test]
async fn a_row_that_is_not_there_yet_is_too_early() {
    let mut db = shop("paid").await;
    let became = orders()
        .transition(&mut db, 404, "processing", "paid")
        .await;
    assert_eq!(became.unwrap(), Transition::TooEarly);
}

#[tokio::test]
async fn a_transition_that_the_order_does_not_have_is_an_error() {
    let mut db = shop("paid").await;
    for (from, to) in [
        ("paid", "processing"),
        ("paid", "paid"),
        ("paid", "lost"),
        ("new", "paid"),
    ] {
        let error = orders().transition(&mut db, 1, from, to).await.unwrap_err();
        assert!(
            matches!(error, GuardError::NoSuchTransition { .. }),
            "{error}"
        );
    }
}

#[test]
fn names_that_could_end_a_name_are_refused() {
    let long = "x".repeat(64);
    for name in ["", "1st", "a b", "a\"b", "a;DROP TABLE b", "ä", &long] {
        for guard in [
            Guard::new(name, "id", "state"),
            Guard::new("shop_order", name, "state"),
            Guard::new("shop_order", "id", name),
        ] {
            let error = guard.order(&["a", "b"]).unwrap_err();
            assert!(matches!(error, GuardError::Name(_)), "{name}: {error}");
        }
    }
}

#[test]
fn an_order_needs_two_different_states() {
    for states in [&[][..], &["a"], &["a", "b", "a"]] {
        let error = Guard::new("t", "k", "s").order(states).unwrap_err();
        assert!(matches!(error, GuardError::Order(_)), "{states:?}: {error}");
    }
}

/// Applies notices such as `paid` to order 1.
struct Notices(Arc<Guard>);

impl Handler for Notices {
    async fn handle(&self, tx: &mut Tx, message: &Delivered) -> Answer {
        let (from, to) = match message.payload.as_ref() {
            b"paid" => ("processing", "paid"),
            _ => ("paid", "refunded"),
        };
        match self.0.transition(tx, 1, from, to).await {
            Ok(Transition::Applied) => Answer::Consumed,
            Ok(Transition::AlreadyApplied) => Answer::rejected("by another message"),
            Ok(Transition::TooEarly) => Answer::Later(Duration::from_secs(5)),
            Ok(Transition::Refused(state)) => Answer::rejected(state),
            Err(error) => Answer::failed(error),
        }
    }
}

#[tokio::test]
async fn a_notice_that_came_too_early_is_applied_later() {
    let world = World::new().await;
    sqlx::raw_sql(
        "CREATE TABLE shop_order (id INTEGER PRIMARY KEY, state TEXT NOT NULL);
         INSERT INTO shop_order VALUES (1, 'processing')",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    let handler = Notices(Arc::new(orders()));
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run(handler, world.shutdown.clone()));
    let service = &world.service;
    // The refund overtakes the payment and comes again; a second refund is not the first.
    for (asked, (number, notice)) in (1..).zip([
        (2, "refunded"),
        (1, "paid"),
        (2, "refunded"),
        (2, "refunded"),
        (3, "refunded"),
    ]) {
        service.deliver(number, notice);
        service.until_answers(asked).await;
    }
    world.stop(running).await;
    service.script(|script| {
        use AnswerKind::{Consumed, Later, Rejected};
        assert_eq!(script.words(1), [Consumed]);
        assert_eq!(script.words(2), [Later, Consumed, Consumed]);
        assert_eq!(script.words(3), [Rejected]);
    });
    let mut db = world.pool.acquire().await.unwrap();
    assert_eq!(state(&mut db, 1).await, "refunded");
}
