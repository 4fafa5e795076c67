//! The previous version and this one work together: while services are upgraded one by one, and
//! while producers and consumers still are what they were.

use std::cell::Cell;
use std::time::Duration;

use handfast_tests::clients::orders;
use handfast_tests::previous::previous;
use handfast_tests::world::handfast;
use handfast_tests::{Engines, Floor, Party, World};
use nix::sys::signal::Signal;

use crate::two_replicas::{REPLICA, rewarded};

const ROUND: usize = 50;
/// More than three leases of the test timers.
const FREEZE: Duration = Duration::from_secs(7);

#[tokio::test]
async fn an_upgrade_one_by_one_under_load_loses_nothing_and_repeats_nothing() {
    let mut world = World::new(Engines::Production).await;
    world.replicated = true;
    world.program = previous().await;
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    world.program = handfast();
    world.start_all().await;
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
    let upgrade = async {
        rewarded(&world, 100).await;
        // It brings the schema up to date under the one that goes on.
        world.stop_process(REPLICA).await;
        world.start_replica(REPLICA).await;
        rewarded(&world, 100).await;
        // Each of the two alone, and then without what the other one held.
        world.freeze(Party::Service);
        rewarded(&world, 100).await;
        tokio::time::sleep(FREEZE).await;
        world.thaw(Party::Service);
        world.process(REPLICA).signal(Signal::SIGSTOP);
        rewarded(&world, 100).await;
        tokio::time::sleep(FREEZE).await;
        world.process(REPLICA).signal(Signal::SIGCONT);
        rewarded(&world, 100).await;
        world.kill_process(REPLICA).await;
        rewarded(&world, 100).await;
        world.start_replica(REPLICA).await;
        rewarded(&world, 100).await;
        // This one ends the upgrade.
        world.crash(Party::Service).await;
        rewarded(&world, 100).await;
        over.set(true);
    };
    let (orders, ()) = tokio::join!(load, upgrade);
    let books = world.drained().await;
    books.hold(Floor {
        paid: orders * 4 / 5,
        refused: orders / 5,
        ..Floor::default()
    });
    eprintln!("{} copies of {orders} were repeats", books.repeats());
    let attempts = books.deliveries.iter().map(|d| d.attempts).max();
    assert!(attempts <= Some(2), "{attempts:?}");
}

#[tokio::test]
async fn producers_and_consumers_of_the_previous_version_go_on_beside_a_new_service() {
    let mut world = World::new(Engines::Production).await;
    world.start(Party::Service).await;
    world.program = previous().await;
    for party in [Party::Payment, Party::Accounting, Party::Points] {
        world.start(party).await;
    }
    let payments = world.payments();
    assert_eq!(payments.pay_all(&orders("a", ROUND)).await, (40, 10));
    // What it had held, the new ones of its kind go on with, and the other way round.
    world.program = handfast();
    for party in [Party::Payment, Party::Accounting, Party::Points] {
        world.crash(party).await;
        let prefix = format!("b-{}", party.name());
        assert_eq!(payments.pay_all(&orders(&prefix, ROUND)).await, (40, 10));
    }
    let books = world.drained().await;
    books.hold(Floor {
        paid: 160,
        refused: 40,
        ..Floor::default()
    });
}

#[tokio::test]
async fn a_service_of_the_previous_version_refuses_the_new_schema_in_one_line() {
    let mut world = World::new(Engines::Production).await;
    world.start(Party::Service).await;
    world.program = previous().await;
    let mut old = world.replica();
    let refused = tokio::task::spawn_blocking(move || old.output()).await;
    let refused = refused.unwrap().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(said.contains("use the newer"), "{said}");
}
