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
const SOON: Duration = Duration::from_secs(20);
/// More than three leases of the test timers.
const FREEZE: Duration = Duration::from_secs(7);

#[tokio::test]
async fn an_upgrade_one_by_one_under_load_loses_nothing_and_does_nothing_twice() {
    let mut world = World::new(Engines::Production).await;
    world.replicated = true;
    world.program = previous().await;
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    world.program = handfast();
    world.start_all().await;
    let payments = world.payments();
    let over = Cell::new(false);
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
    let (orders, ()) = tokio::join!(payments.pay_until(&over), upgrade);
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
async fn producers_and_consumers_of_both_versions_go_on_with_what_the_others_held() {
    let mut world = World::new(Engines::Production).await;
    world.start(Party::Service).await;
    world.program = previous().await;
    world.start_all().await;
    let payments = world.payments();
    let mut orders_so_far = 0;
    // The new ones come, and then the old ones again.
    for (version, program) in [("new", handfast()), ("old", previous().await)] {
        for party in [Party::Payment, Party::Accounting, Party::Points] {
            world.program = program.clone();
            let orders = orders(&format!("{version}-{}", party.name()), ROUND);
            let changes = async {
                rewarded(&world, ROUND / 5).await;
                world.crash(party).await;
            };
            let (paid, ()) = tokio::join!(payments.pay_all(&orders), changes);
            assert_eq!(paid, (ROUND * 4 / 5, ROUND / 5));
            orders_so_far += ROUND;
        }
    }
    let books = world.drained().await;
    books.hold(Floor {
        paid: orders_so_far * 4 / 5,
        refused: orders_so_far / 5,
        ..Floor::default()
    });
}

#[tokio::test]
async fn a_service_of_the_previous_version_refuses_the_new_schema_in_one_line() {
    let mut world = World::new(Engines::Production).await;
    world.start(Party::Service).await;
    world.program = previous().await;
    let command = world.replica();
    world.spawn("old", command);
    let ended = world.process("old").end(SOON).await;
    assert_eq!(ended.code(), Some(1));
    let said = std::fs::read_to_string(world.file("old.log")).unwrap();
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(said.contains("use the newer"), "{said}");
}
