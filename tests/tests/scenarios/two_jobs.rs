//! A job that works off what is due is started twice.

use handfast_tests::clients::Order;
use handfast_tests::database::number;
use handfast_tests::{Engines, Floor, Party, World, on_both_engines};
use payment::client::PaymentStatus;

on_both_engines! {
    two_payment_jobs_try_each_unfinished_payment_once,
    a_payment_that_two_processes_are_asked_for_is_made_once,
}

async fn two_payment_jobs_try_each_unfinished_payment_once(engines: Engines) {
    let mut world = World::new(engines).await;
    world.pay_deadline_ms = 200;
    // Without the service nothing can be decided, so a killed payment leaves ten unfinished.
    world.start(Party::Payment).await;
    for n in 0..10 {
        let reply = world.payments().asks(&Order::new(format!("a-{n}"))).await;
        assert_eq!(reply.unwrap().status(), PaymentStatus::Processing);
    }
    world.kill(Party::Payment).await;
    let before = world.books().await;
    let unfinished = before
        .payments
        .iter()
        .filter(|p| p.state == "PAYING")
        .count();
    assert_eq!((unfinished, before.done.len()), (10, 0));

    // Both are asked nothing; what they do, their jobs do.
    world.pay_deadline_ms = 5_000;
    world.start(Party::Service).await;
    world.start(Party::Payment).await;
    let second = world.second(Party::Payment);
    world.spawn("second", second);
    world.start_all().await;
    let books = world.drained().await;
    books.hold(Floor {
        paid: 10,
        ..Floor::default()
    });
    assert_eq!(
        books.tries,
        before.tries + 10,
        "one more each, though two jobs looked"
    );
    assert!(world.runs("second"));
}

async fn a_payment_that_two_processes_are_asked_for_is_made_once(engines: Engines) {
    let mut world = World::running(engines).await;
    let second = world.second(Party::Payment);
    world.spawn("second", second);
    let other = handfast_tests::clients::Payments::at(world.channel(&world.second_payment_url()));
    for n in 0..10 {
        let order = Order::new(format!("a-{n}"));
        let first = world.payments();
        tokio::join!(first.pays(&order), other.pays(&order));
    }
    let books = world.drained().await;
    books.hold(Floor {
        paid: 10,
        ..Floor::default()
    });
    let db = world.database("payment").await;
    assert_eq!(number(&db, "SELECT count(*) FROM payment").await, 10);
    db.close().await;
}
