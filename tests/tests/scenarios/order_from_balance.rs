//! An order is paid from the balance, and the answer is lost. The order service is a program
//! of its own (`src/bin/order.rs`).

use std::process::Command;
use std::time::Duration;

use handfast_fail_points::Point;
use handfast_tests::database::{look_at, number, rows};
use handfast_tests::{Books, Engines, Floor, Party, World, eventually, on_both_engines};

on_both_engines! {
    one_deduction_per_order_though_the_answer_is_lost_and_the_user_tries_again,
    a_payment_that_crashed_while_paying_is_finished_though_nobody_asks_again,
    a_time_out_is_not_taken_for_a_failure,
}

const SOON: Duration = Duration::from_secs(20);
const CAROL: &str = "carol";

/// The order service, with one of its words.
fn order(world: &World, word: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_order"));
    command
        .arg(word)
        .arg(world.payment_url())
        .arg(world.file("order.db"));
    command
}

/// A user tries to pay an order, and reads this on the screen.
async fn tries(world: &World, id: &str, amount: i64) -> String {
    let mut command = order(world, "pay");
    command.arg(id).arg(CAROL).arg(amount.to_string());
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().expect("the order service starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

async fn settled(world: &World) -> Vec<(String, String)> {
    let db = look_at(&world.file("order.db")).await;
    eventually("no order is PAYING", SOON, async || {
        let paying = "SELECT count(*) FROM shop_order WHERE state = 'PAYING'";
        let paying = number(&db, paying).await;
        (paying == 0)
            .then_some(())
            .ok_or_else(|| format!("{paying} are"))
    })
    .await;
    let settled = rows(&db, "SELECT id, state FROM settled ORDER BY id").await;
    db.close().await;
    settled
}

fn paid_by_carol(books: &Books) -> i64 {
    let paid = books
        .payments
        .iter()
        .filter(|payment| payment.state == "PAID");
    paid.map(|payment| payment.amount).sum()
}

async fn one_deduction_per_order_though_the_answer_is_lost_and_the_user_tries_again(
    engines: Engines,
) {
    let mut world = World::new(engines).await;
    world.open_account(CAROL, 200).await;
    world.start(Party::Service).await;
    let point = Point::PRODUCER_AFTER_COMMIT;
    world.start_to_die(Party::Payment, point, 1).await;

    assert_eq!(
        tries(&world, "1", 100).await,
        "UNKNOWN",
        "the answer is lost"
    );
    world.died_at(Party::Payment, point).await;
    assert_eq!(world.books().await.done.len(), 1, "and yet it was deducted");
    assert_eq!(tries(&world, "1", 100).await, "UNKNOWN", "payment is down");
    assert_eq!(
        tries(&world, "2", 100).await,
        "UNKNOWN",
        "another order, too"
    );

    // The job that compares is started twice.
    for name in ["reconcile-1", "reconcile-2"] {
        let job = order(&world, "reconcile");
        world.spawn(name, job);
    }
    world.start_all().await;
    let expected = [("1", "PAID"), ("2", "PAID")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(settled(&world).await, expected, "each order settled once");
    assert_eq!(tries(&world, "1", 100).await, "PAID");
    assert_eq!(tries(&world, "3", 100).await, "REFUSED", "nothing is left");

    let books = world.drained().await;
    books.hold(Floor {
        paid: 2,
        refused: 1,
        ..Floor::default()
    });
    assert_eq!(paid_by_carol(&books), 200);
    assert!(world.runs("reconcile-1") && world.runs("reconcile-2"));
}

async fn a_payment_that_crashed_while_paying_is_finished_though_nobody_asks_again(
    engines: Engines,
) {
    let mut world = World::new(engines).await;
    world.open_account(CAROL, 200).await;
    world.start(Party::Service).await;
    let point = Point::PRODUCER_BEFORE_COMMIT;
    world.start_to_die(Party::Payment, point, 1).await;
    assert_eq!(tries(&world, "1", 100).await, "UNKNOWN");
    world.died_at(Party::Payment, point).await;
    let books = world.books().await;
    assert_eq!(books.payments[0].state, "PAYING");
    assert_eq!(books.done.len(), 0);

    world.start_all().await;
    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        ..Floor::default()
    });
    assert_eq!(paid_by_carol(&books), 100);
}

async fn a_time_out_is_not_taken_for_a_failure(engines: Engines) {
    let mut world = World::new(engines).await;
    world.open_account(CAROL, 200).await;
    world.start_all().await;
    world.freeze(Party::Payment);
    assert_eq!(tries(&world, "1", 100).await, "UNKNOWN");
    assert_eq!(tries(&world, "1", 100).await, "UNKNOWN");
    world.thaw(Party::Payment);
    let job = order(&world, "reconcile");
    world.spawn("reconcile", job);
    let expected = [("1".to_owned(), "PAID".to_owned())];
    assert_eq!(settled(&world).await, expected);
    let books = world.drained().await;
    books.hold(Floor {
        paid: 1,
        ..Floor::default()
    });
    assert_eq!(books.payments.len(), 1);
}
