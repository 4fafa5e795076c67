//! The state guard on a program's own table.

use std::sync::Arc;
use std::time::Duration;

use handfast_consumer::{Answer, Delivered, Guard, GuardError, Handler, Key, Transition, Tx};
use handfast_proto::v1::AnswerKind;
use uuid::Uuid;

use crate::common::{Database, World, on_every_database};

on_every_database! {
    every_case_has_its_own_answer,
    a_row_that_is_not_there_yet_is_too_early,
    a_row_is_found_by_text_and_by_uuid,
    a_transition_that_the_order_does_not_have_is_an_error,
    a_notice_that_came_too_early_is_applied_later,
}

fn orders() -> Guard {
    Guard::new("shop_order", "id", "state")
        .order(&["processing", "paid", "refunded"])
        .unwrap()
}

async fn shop<D: Database>(state: &str) -> World<D> {
    let world = World::new().await;
    world
        .run(&format!(
            "CREATE TABLE shop_order (id BIGINT PRIMARY KEY, state TEXT NOT NULL);
             INSERT INTO shop_order VALUES (1, '{state}'), (2, 'processing')"
        ))
        .await;
    world
}

async fn state<D: Database>(world: &World<D>) -> String {
    D::text(&world.pool, "SELECT state FROM shop_order WHERE id = 1").await
}

async fn every_case_has_its_own_answer<D: Database>() {
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
    let world = shop::<D>("").await;
    for (current, from, to, expected) in cases {
        world
            .run(&format!(
                "UPDATE shop_order SET state = '{current}' WHERE id = 1"
            ))
            .await;
        let mut tx = world.pool.begin().await.unwrap();
        let became = orders().transition(&mut *tx, 1, from, to).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(became, expected, "{current}: {from} to {to}");
        let wanted = if expected == Transition::Applied {
            to
        } else {
            current
        };
        assert_eq!(state(&world).await, wanted);
    }
    let other = "SELECT state FROM shop_order WHERE id = 2";
    assert_eq!(D::text(&world.pool, other).await, "processing");
}

async fn a_row_that_is_not_there_yet_is_too_early<D: Database>() {
    let world = shop::<D>("paid").await;
    let mut tx = world.pool.begin().await.unwrap();
    let became = orders()
        .transition(&mut *tx, 404, "processing", "paid")
        .await;
    assert_eq!(became.unwrap(), Transition::TooEarly);
}

async fn a_row_is_found_by_text_and_by_uuid<D: Database>() {
    let world = World::<D>::new().await;
    let uuid = Uuid::from_u128(7);
    world
        .run(
            "CREATE TABLE by_text (id TEXT PRIMARY KEY, state TEXT NOT NULL);
             CREATE TABLE by_uuid (id UUID PRIMARY KEY, state TEXT NOT NULL);
             INSERT INTO by_text VALUES ('o-7', 'a')",
        )
        .await;
    let mut tx = world.pool.begin().await.unwrap();
    D::insert_uuid(&mut tx, "INSERT INTO by_uuid VALUES ($1, 'a')", uuid).await;
    for (table, key) in [("by_text", Key::from("o-7")), ("by_uuid", Key::from(uuid))] {
        let guard = Guard::new(table, "id", "state").order(&["a", "b"]).unwrap();
        for expected in [Transition::Applied, Transition::AlreadyApplied] {
            let became = guard.transition(&mut *tx, key.clone(), "a", "b").await;
            assert_eq!(became.unwrap(), expected, "{table}");
        }
    }
}

async fn a_transition_that_the_order_does_not_have_is_an_error<D: Database>() {
    let world = shop::<D>("paid").await;
    let mut tx = world.pool.begin().await.unwrap();
    for (from, to) in [
        ("paid", "processing"),
        ("paid", "paid"),
        ("paid", "lost"),
        ("new", "paid"),
    ] {
        let error = orders()
            .transition(&mut *tx, 1, from, to)
            .await
            .unwrap_err();
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

impl<D: Database> Handler<D> for Notices {
    async fn handle(&self, tx: &mut Tx<D>, message: &Delivered) -> Answer {
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

async fn a_notice_that_came_too_early_is_applied_later<D: Database>() {
    let world = shop::<D>("processing").await;
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
    assert_eq!(state(&world).await, "refunded");
}
