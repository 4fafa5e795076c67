//! Two message services on one PostgreSQL and one RabbitMQ, of which one is frozen or killed.

use std::cell::Cell;
use std::time::Duration;

use handfast_tests::clients::orders;
use handfast_tests::{Books, Engines, Floor, Party, World, eventually};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(20);
/// More than three leases of the test timers.
const FREEZE: Duration = Duration::from_secs(7);
/// Orders that are paid between two looks at whether the faults are over.
const ROUND: usize = 50;
const REPLICA: &str = "replica";

/// Waits until so many more payments were rewarded.
async fn rewarded(world: &World, more: usize) {
    let wanted = world.books().await.grants.len() + more;
    eventually(format!("{wanted} rewards"), SOON, async || {
        let grants = world.books().await.grants.len();
        let enough = grants >= wanted;
        enough.then_some(()).ok_or_else(|| grants.to_string())
    })
    .await;
}

#[tokio::test]
async fn one_of_two_replicas_that_freezes_or_dies_changes_nothing() {
    let mut world = World::running(Engines::Production).await;
    world.start_replica(REPLICA).await;
    let payments = world.payments();
    let over = Cell::new(false);
    let load = async {
        let mut rounds = 0;
        while !over.get() {
            let orders = orders(&format!("a{rounds}"), ROUND);
            let paid = payments.pay_all(&orders).await;
            assert_eq!(paid, (ROUND * 4 / 5, ROUND / 5));
            rounds += 1;
        }
        rounds * ROUND
    };
    let faults = async {
        rewarded(&world, 50).await;
        world.process(REPLICA).signal(Signal::SIGSTOP);
        // What the frozen one has claimed is taken over when its leases have ended.
        rewarded(&world, 50).await;
        tokio::time::sleep(FREEZE).await;
        world.process(REPLICA).signal(Signal::SIGCONT);
        rewarded(&world, 20).await;

        world.freeze(Party::Service);
        tokio::time::sleep(FREEZE).await;
        world.thaw(Party::Service);
        rewarded(&world, 20).await;

        world.kill_process(REPLICA).await;
        rewarded(&world, 20).await;
        over.set(true);
    };
    let (orders, ()) = tokio::join!(load, faults);
    let books = world.drained().await;
    books.hold(Floor {
        paid: orders * 4 / 5,
        refused: orders / 5,
        ..Floor::default()
    });
    // RabbitMQ notices a frozen process after its heartbeats, 20 s, and only then gives others the
    // answers that it held. The test timers are shorter, so some were sent again meanwhile.
    let attempts = books.deliveries.iter().map(|d| d.attempts).max();
    assert!(attempts <= Some(2), "{attempts:?}");
    let (copies, messages) = Books::copies(&books.seen_by_points);
    eprintln!("{copies} copies of {messages} messages");
}
