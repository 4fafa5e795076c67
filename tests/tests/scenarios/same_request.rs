//! The same payment request arrives several times.

use futures_util::future::join_all;
use handfast_tests::clients::Order;
use handfast_tests::{Engines, Floor, Party, World, on_both_engines};
use payment::client::PaymentStatus;
use tonic::Code;

on_both_engines! {
    at_the_same_moment_and_later_all_callers_get_the_one_answer,
    another_amount_for_the_same_order_is_a_conflict_and_changes_nothing,
}

async fn at_the_same_moment_and_later_all_callers_get_the_one_answer(engines: Engines) {
    let mut world = World::running(engines).await;
    let (order, refused) = (Order::new("a-1"), Order::of_a_poor_user("a-2"));
    let merchants: Vec<_> = (0..40).map(|_| world.payments()).collect();
    let answers = join_all(merchants.iter().map(|merchant| merchant.asks(&order))).await;
    for answer in answers {
        assert_eq!(answer.unwrap().status(), PaymentStatus::Paid);
    }
    let answers = join_all(merchants.iter().map(|merchant| merchant.asks(&refused))).await;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), PaymentStatus::Refused);
        assert_eq!(answer.reason, "insufficient balance");
    }
    world.crash(Party::Payment).await;
    assert_eq!(world.payments().pays(&order).await, PaymentStatus::Paid);
    assert_eq!(
        world.payments().pays(&refused).await,
        PaymentStatus::Refused
    );

    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        refused: 1,
        ..Floor::default()
    });
    assert_eq!(books.payments.len(), 2, "one row each");
    assert_eq!(books.tries, 2, "one try each");
}

async fn another_amount_for_the_same_order_is_a_conflict_and_changes_nothing(engines: Engines) {
    let world = World::running(engines).await;
    let order = Order::new("a-1");
    assert_eq!(world.payments().pays(&order).await, PaymentStatus::Paid);
    let other = world.payments().asks(&order.clone().for_amount(999)).await;
    assert_eq!(other.unwrap_err().code(), Code::AlreadyExists);

    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        ..Floor::default()
    });
    assert_eq!(books.payments[0].amount, order.amount);
    assert_eq!(books.vouchers[0].amount, order.amount);
}
