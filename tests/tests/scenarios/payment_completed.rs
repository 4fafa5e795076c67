//! A payment is completed: accounting books it and points rewards it, once each, whatever
//! happens to payment on the way.

use handfast_fail_points::Point;
use handfast_proto::v1::ShowMessageRequest;
use handfast_tests::clients::{Order, orders};
use handfast_tests::{Engines, Floor, Party, World, on_both_engines};
use payment::client::PaymentStatus;

on_both_engines! {
    every_paid_order_is_booked_and_rewarded_once_and_no_other,
    a_notice_that_is_repeated_and_late_changes_nothing,
    payment_dies_between_its_commit_and_its_confirm_and_the_check_decides,
    payment_dies_before_its_commit_and_the_next_try_pays_once,
    a_confirm_that_is_lost_is_made_good_by_the_check,
    the_timeline_of_a_payment_tells_its_life_in_order,
}

async fn every_paid_order_is_booked_and_rewarded_once_and_no_other(engines: Engines) {
    let world = World::running(engines).await;
    let (paid, refused) = world.payments().pay_all(&orders("a", 40)).await;
    assert_eq!((paid, refused), (32, 8));

    let books = world.drained().await;
    books.hold(Floor {
        paid: 32,
        refused: 8,
        ..Floor::default()
    });
    assert_eq!(books.decided("CANCELLED", "PRODUCER"), 8, "one per refusal");
}

async fn a_notice_that_is_repeated_and_late_changes_nothing(engines: Engines) {
    let world = World::running(engines).await;
    let payments = world.payments();
    let order = Order::new("a-1");
    assert_eq!(payments.pays(&order).await, PaymentStatus::Paid);
    world.drained().await;

    for _ in 0..20 {
        assert_eq!(payments.pays(&order).await, PaymentStatus::Paid);
    }
    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        ..Floor::default()
    });
    assert_eq!(books.tries, 1, "an answer that is stored is not tried for");
    assert_eq!(books.messages.len(), 1);
}

async fn payment_dies_between_its_commit_and_its_confirm_and_the_check_decides(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let point = Point::PRODUCER_AFTER_COMMIT;
    world.start_to_die(Party::Payment, point, 1).await;
    let order = Order::new("a-1");
    let lost = world.payments().asks(&order).await;
    assert!(lost.is_err(), "its reply is lost with it: {lost:?}");
    world.died_at(Party::Payment, point).await;
    let books = world.books().await;
    assert_eq!(books.done.len(), 1, "it had committed");
    assert_eq!(books.messages[0].state, "PREPARED");

    world.start_all().await;
    let books = world.drained().await;
    assert_eq!(books.decided("CONFIRMED", "CHECK"), 1);
    // The merchant asks again, and learns what happened without paying again.
    let again = world.payments().pays(&order).await;
    assert_eq!(again, PaymentStatus::Paid);
    world.drained().await.hold(Floor {
        paid: 1,
        confirmed_by_check: 1,
        ..Floor::default()
    });
}

async fn payment_dies_before_its_commit_and_the_next_try_pays_once(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let point = Point::PRODUCER_BEFORE_COMMIT;
    world.start_to_die(Party::Payment, point, 1).await;
    let order = Order::new("a-1");
    let lost = world.payments().asks(&order).await;
    assert!(lost.is_err(), "{lost:?}");
    world.died_at(Party::Payment, point).await;
    let books = world.books().await;
    assert_eq!((books.done.len(), books.tries), (0, 1), "it had begun");

    world.start_all().await;
    assert_eq!(world.payments().pays(&order).await, PaymentStatus::Paid);
    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        cancelled_by_check: 1,
        ..Floor::default()
    });
    assert_eq!(books.messages.len(), 2, "the try that died and the next");
    assert_eq!(books.tries, 2);
}

async fn a_confirm_that_is_lost_is_made_good_by_the_check(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
    world.start_armed(Party::Payment, &lose).await;
    world.start_all().await;
    let (paid, _) = world.payments().pay_all(&orders("a", 10)).await;

    let books = world.drained().await;
    books.hold(Floor {
        paid: 8,
        refused: 2,
        confirmed_by_check: paid,
        ..Floor::default()
    });
    assert_eq!(books.decided("CONFIRMED", "PRODUCER"), 0);
}

async fn the_timeline_of_a_payment_tells_its_life_in_order(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
    world.start_armed(Party::Payment, &lose).await;
    world.start_all().await;
    assert_eq!(world.payments().pay_all(&orders("a", 5)).await, (4, 1));
    let books = world.drained().await;
    for message in &books.messages {
        let request = ShowMessageRequest {
            message_id: message.id.clone(),
            with_body: false,
        };
        let shown = world.console().show_message(request).await.unwrap();
        let timeline = shown.into_inner().timeline;
        assert!(timeline.is_sorted_by_key(|entry| entry.at), "{timeline:?}");
        let kinds = |subscription: &str| {
            let entries = timeline.iter().filter(|e| e.subscription == subscription);
            let kinds = entries.map(|entry| entry.kind.as_str());
            // An answer may be faster than the note that a delivery was sent.
            kinds.filter(|kind| *kind != "sent").collect::<Vec<_>>()
        };
        match message.state.as_str() {
            "CONFIRMED" => {
                assert_eq!(kinds("").first(), Some(&"prepared"), "{timeline:?}");
                assert_eq!(kinds("").last(), Some(&"confirmed"), "{timeline:?}");
                assert_eq!(kinds("accounting"), ["consumed"], "{timeline:?}");
                assert_eq!(kinds("points"), ["consumed"], "{timeline:?}");
            }
            _ => assert_eq!(kinds(""), ["prepared", "cancelled"], "{timeline:?}"),
        }
    }
}
