//! A process is killed at every durable step there is, and nothing is lost, invented or done
//! twice.
//!
//! The list of points is the program's own, so a new point without a workload that reaches it
//! fails here.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _, stream};
use handfast_fail_points::Point;
use handfast_tests::clients::{message, name_of, orders};
use handfast_tests::database::number;
use handfast_tests::{Books, Config, Engines, Floor, Party, World, eventually, on_both_engines};
use nix::sys::signal::Signal;

/// Worlds that are broken at the same time.
const WORLDS: usize = 4;
/// Orders of one workload; every fifth is refused.
const ORDERS: usize = 25;
const FLOOR: Floor = Floor {
    paid: 20,
    refused: 5,
    confirmed_by_check: 0,
    cancelled_by_check: 0,
    repeats: 0,
};
const SOON: Duration = Duration::from_secs(15);

on_both_engines! {
    a_process_may_die_at_every_durable_step,
}

/// The pair of engines that alone passes this point, if it is not both.
fn only_on(point: Point) -> Option<Engines> {
    match point {
        // What a stream of the service carries.
        Point::DELIVER_AFTER_WRITE => Some(Engines::Embedded),
        // What RabbitMQ carries, there and back.
        Point::RELAY_HANDED
        | Point::RELAY_CONFIRMED
        | Point::ANSWERS_RECORDED
        | Point::ANNOUNCE_BEFORE_COMMIT
        | Point::ANNOUNCE_AFTER_COMMIT
        | Point::TURN_BEFORE_COMMIT
        | Point::TURN_AFTER_COMMIT
        | Point::CONSUMER_PUBLISHED => Some(Engines::Production),
        _ => None,
    }
}

async fn a_process_may_die_at_every_durable_step(engines: Engines) {
    let reached = |point: &Point| only_on(*point).is_none_or(|only| only == engines);
    let points: Vec<_> = Point::ALL.iter().copied().filter(reached).collect();
    each_of(points, WORLDS, |point| dies_at(engines, point)).await;
}

/// Runs something for each of these, in so many worlds at the same time, and fails with the names
/// of all for which it failed.
pub(crate) async fn each_of<T: Copy + Debug, F: Future<Output = ()>>(
    all: Vec<T>,
    worlds: usize,
    runs: impl Fn(T) -> F,
) {
    let expected = all.len();
    let ends: Vec<_> = stream::iter(all)
        .map(|one| {
            let end = AssertUnwindSafe(runs(one)).catch_unwind();
            async move { (one, end.await) }
        })
        .buffer_unordered(worlds)
        .collect()
        .await;
    assert_eq!(ends.len(), expected);
    let failed: Vec<_> = ends
        .into_iter()
        .filter(|(_, end)| end.is_err())
        .map(|(one, _)| one)
        .collect();
    assert!(
        failed.is_empty(),
        "what failed is printed above: {failed:?}"
    );
}

/// Runs the workload that reaches the point, and reads from the databases that it all came
/// right.
async fn dies_at(engines: Engines, point: Point) {
    // Constants of a type that is compared by its name: a point that is not listed falls
    // through to the panic.
    match point {
        Point::TOPOLOGY_BEFORE_COMMIT | Point::TOPOLOGY_AFTER_COMMIT => {
            topology(engines, point).await;
        }
        Point::PUBLISH_BEFORE_COMMIT | Point::PUBLISH_AFTER_COMMIT => publish(engines, point).await,
        Point::PREPARE_BEFORE_COMMIT
        | Point::PREPARE_AFTER_COMMIT
        | Point::DECIDE_BEFORE_COMMIT
        | Point::DECIDE_AFTER_COMMIT
        | Point::DELIVER_AFTER_WRITE
        | Point::RELAY_HANDED
        | Point::ANNOUNCE_BEFORE_COMMIT
        | Point::ANNOUNCE_AFTER_COMMIT
        | Point::TURN_BEFORE_COMMIT
        | Point::TURN_AFTER_COMMIT
        | Point::RELAY_CONFIRMED => busy(engines, Party::Service, point, 3).await,
        Point::CLAIM_BEFORE_COMMIT | Point::CLAIM_AFTER_COMMIT => match engines {
            Engines::Embedded => busy(engines, Party::Service, point, 3).await,
            Engines::Production => left_to_claim(point, None).await,
        },
        Point::ANSWERS_RECORDED
        | Point::ACKNOWLEDGE_BEFORE_COMMIT
        | Point::ACKNOWLEDGE_AFTER_COMMIT => {
            // From RabbitMQ the answers of many payments may come in one batch.
            let nth = match engines {
                Engines::Embedded => 3,
                Engines::Production => 1,
            };
            busy(engines, Party::Service, point, nth).await;
        }
        Point::CLAIM_CHECKS_BEFORE_COMMIT
        | Point::CLAIM_CHECKS_AFTER_COMMIT
        | Point::SETTLE_CHECKS_BEFORE_COMMIT
        | Point::SETTLE_CHECKS_AFTER_COMMIT => checking_service(engines, point).await,
        Point::SENT_BEFORE_COMMIT | Point::SENT_AFTER_COMMIT => slow_consumer(engines, point).await,
        Point::RETURN_BEFORE_COMMIT | Point::RETURN_AFTER_COMMIT => match engines {
            Engines::Embedded => dead_consumer(point).await,
            Engines::Production => lost_queue(point).await,
        },
        Point::RECOVER_BEFORE_COMMIT | Point::RECOVER_AFTER_COMMIT => too_old(engines, point).await,
        Point::RETIRE_BEFORE_COMMIT | Point::RETIRE_AFTER_COMMIT => retire(engines, point).await,
        Point::PRODUCER_PREPARED
        | Point::PRODUCER_FENCED
        | Point::PRODUCER_BEFORE_COMMIT
        | Point::PRODUCER_AFTER_COMMIT
        | Point::PRODUCER_AFTER_CONFIRM => busy(engines, Party::Payment, point, 4).await,
        Point::PRODUCER_ROLLED_BACK | Point::PRODUCER_ROLLBACK_FENCED => {
            busy(engines, Party::Payment, point, 2).await;
        }
        Point::PRODUCER_LOSE_CONFIRM => lost_confirms(engines).await,
        Point::PRODUCER_CHECK_BEFORE_COMMIT | Point::PRODUCER_CHECK_AFTER_COMMIT => {
            checked_producer(engines, point).await;
        }
        Point::CONSUMER_INBOX_WRITTEN
        | Point::CONSUMER_BEFORE_COMMIT
        | Point::CONSUMER_AFTER_COMMIT
        | Point::CONSUMER_PUBLISHED
        | Point::CONSUMER_ANSWERED => {
            busy(engines, Party::Accounting, point, 2).await;
            busy(engines, Party::Points, point, 1).await;
        }
        other => panic!("no workload reaches `{other}`; write one"),
    }
}

/// Everybody works, one dies, is started again, and the rest is done.
async fn busy(engines: Engines, party: Party, point: Point, nth: u32) {
    let mut world = World::new(engines).await;
    // The service first: a consumer that is to die must have something to do.
    for other in Party::ALL {
        match other == party {
            true => world.start_to_die(party, point, nth).await,
            false => world.start(other).await,
        }
    }
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let deaths = async {
        world.died_at(party, point).await;
        world.start(party).await;
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), deaths);
    assert_eq!(paid, (20, 5));
    world.drained().await.hold(FLOOR);
}

/// The service dies with deliveries in its memory that confirms have leased to it, and again
/// when it claims what those leases have left. Either it comes back after that, or another one,
/// which stood still until then, does the rest alone.
pub(crate) async fn left_to_claim(point: Point, other: Option<&str>) {
    let mut world = World::new(Engines::Production).await;
    world.replicated = other.is_some();
    let handed = Point::RELAY_HANDED;
    world.start_to_die(Party::Service, handed, 1).await;
    if let Some(other) = other {
        world.start_replica(other).await;
        world.process(other).signal(Signal::SIGSTOP);
    }
    world.start_all().await;
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let deaths = async {
        world.died_at(Party::Service, handed).await;
        let db = world.database("service").await;
        let count = async |what: &str| {
            let count = format!("SELECT count(*) FROM delivery WHERE state = 'PENDING' AND {what}");
            number(&db, &count).await
        };
        assert!(count("token IS NOT NULL").await > 0, "something was leased");
        eventually("the leases have ended", SOON, async || {
            let young = count(&format!("due_at > {}", db.ago(0))).await;
            (young == 0)
                .then_some(())
                .ok_or_else(|| format!("{young} have not"))
        })
        .await;
        let mut claimed = 0;
        // The first claims may be those of lanes that have nothing to do.
        for nth in 1..=8 {
            world.start_to_die(Party::Service, point, nth).await;
            world.died_at(Party::Service, point).await;
            claimed = count("generation = 2").await;
            if claimed > 0 || point == Point::CLAIM_BEFORE_COMMIT {
                break;
            }
        }
        match point == Point::CLAIM_AFTER_COMMIT {
            true => assert!(claimed > 0, "the claim is durable"),
            false => assert_eq!(claimed, 0, "the claim was not committed"),
        }
        db.close().await;
        match other {
            Some(other) => world.process(other).signal(Signal::SIGCONT),
            None => world.start(Party::Service).await,
        }
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), deaths);
    assert_eq!(paid, (20, 5));
    world.drained().await.hold(FLOOR);
}

/// Confirms are lost, so the service has to ask.
async fn lost_confirms(engines: Engines) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
    world.start_armed(Party::Payment, &lose).await;
    world.start_all().await;
    assert_eq!(
        world.payments().pay_all(&orders("a", ORDERS)).await,
        (20, 5)
    );
    world.drained().await.hold(Floor {
        confirmed_by_check: 20,
        ..FLOOR
    });
}

/// The service dies at a check, of messages whose checks were due when it started.
async fn checking_service(engines: Engines, point: Point) {
    let mut world = World::new(engines).await;
    // So late that a busy machine has paid and killed the service before anything is checked.
    let later = world.config.clone().check_after(4_000);
    world.config = later.server("max_undecided", 1_000);
    world.start(Party::Service).await;
    let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
    world.start_armed(Party::Payment, &lose).await;
    let paid = world.payments().pay_all(&orders("a", 4)).await;
    assert_eq!(paid, (4, 0));
    world.kill(Party::Service).await;
    let undecided = undecided_by_now(&world).await;
    let file = world.database("service").await;
    // An idle poll writes nothing about checks; only what is due shows that this one does.
    eventually("checks are due", SOON, async || {
        let due = format!(
            "SELECT count(*) FROM message WHERE state = 'PREPARED' AND check_at < {}",
            file.ago(0)
        );
        let due = number(&file, &due).await;
        (due == undecided)
            .then_some(())
            .ok_or_else(|| format!("{due} of {undecided} due"))
    })
    .await;
    file.close().await;
    if undecided > 0 {
        world.start_to_die(Party::Service, point, 1).await;
        world.died_at(Party::Service, point).await;
    } else {
        panic!("everything was checked before the service was killed");
    }
    let settled = world.books().await.decided("CONFIRMED", "CHECK");
    let all = usize::try_from(undecided).expect("a count");
    if point == Point::SETTLE_CHECKS_AFTER_COMMIT {
        assert_eq!(settled, 4, "what was settled is durable");
    } else {
        assert_eq!(settled, 4 - all, "what was not committed is not settled");
    }
    world.start_all().await;
    world.drained().await.hold(Floor {
        paid: 4,
        confirmed_by_check: 4,
        ..Floor::default()
    });
}

async fn undecided_by_now(world: &World) -> i64 {
    let db = world.database("service").await;
    let prepared = number(&db, "SELECT count(*) FROM message WHERE state = 'PREPARED'").await;
    db.close().await;
    prepared
}

/// The producer dies while it is asked.
async fn checked_producer(engines: Engines, point: Point) {
    let mut world = World::new(engines).await;
    world.start(Party::Service).await;
    let lose = Point::PRODUCER_LOSE_CONFIRM;
    let armed = format!("{lose}=return;{point}=abort@2");
    world.start_armed(Party::Payment, &armed).await;
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let deaths = async {
        world.died_at(Party::Payment, point).await;
        world.start_all().await;
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), deaths);
    assert_eq!(paid, (20, 5));
    world.drained().await.hold(Floor {
        confirmed_by_check: 1,
        ..FLOOR
    });
}

/// SENT is written only about what is not answered at once, so both consumers are frozen: an answer
/// that overtakes a mark leaves nothing to mark.
async fn slow_consumer(engines: Engines, point: Point) {
    let mut world = World::new(engines).await;
    world.start_to_die(Party::Service, point, 1).await;
    world.start_all().await;
    world.freeze(Party::Accounting);
    world.freeze(Party::Points);
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let deaths = async {
        world.died_at(Party::Service, point).await;
        let marked = sent(&world.books().await);
        match point == Point::SENT_AFTER_COMMIT {
            true => assert!(marked > 0, "SENT is durable"),
            false => assert_eq!(marked, 0, "SENT was not committed"),
        }
        world.thaw(Party::Accounting);
        world.thaw(Party::Points);
        world.start(Party::Service).await;
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), deaths);
    assert_eq!(paid, (20, 5));
    world.drained().await.hold(FLOOR);
}

fn sent(books: &Books) -> usize {
    let sent = books.deliveries.iter().filter(|d| d.state == "SENT");
    sent.count()
}

/// Accounting dies with deliveries in its hands, and the service while it takes them back.
async fn dead_consumer(point: Point) {
    let mut world = World::new(Engines::Embedded).await;
    world.start_to_die(Party::Service, point, 1).await;
    world.start_all().await;
    world.freeze(Party::Accounting);
    assert_eq!(
        world.payments().pay_all(&orders("a", ORDERS)).await,
        (20, 5)
    );
    eventually("accounting has deliveries in its hands", SOON, async || {
        let sent = sent(&world.books().await);
        (sent > 0)
            .then_some(())
            .ok_or_else(|| "none is SENT".to_owned())
    })
    .await;
    world.kill(Party::Accounting).await;
    world.died_at(Party::Service, point).await;
    world.start_all().await;
    world.drained().await.hold(FLOOR);
}

/// Accounting's queue is gone, and the service dies while it takes back what RabbitMQ returned.
async fn lost_queue(point: Point) {
    let mut world = World::new(Engines::Production).await;
    world.start_to_die(Party::Service, point, 1).await;
    world.start_all().await;
    let payments = world.payments();
    let orders = orders("a", ORDERS);
    let deaths = async {
        // It is made again at once, so it is deleted until a delivery has found it missing.
        eventually("a delivery was returned", SOON, async || {
            world.delete_queue_in_use("accounting").await;
            let runs = world.runs("service");
            (!runs).then_some(()).ok_or_else(|| "none was".to_owned())
        })
        .await;
        world.died_at(Party::Service, point).await;
        world.start(Party::Service).await;
    };
    let (paid, ()) = tokio::join!(payments.pay_all(&orders), deaths);
    assert_eq!(paid, (20, 5));
    world.drained().await.hold(FLOOR);
}

/// Deliveries grow too old while nobody consumes them, and the service dies while it gives
/// them up.
async fn too_old(engines: Engines, point: Point) {
    let mut world = World::new(engines).await;
    world.config = world.config.clone().topic("parcel").subscription_with(
        "a-courier",
        "parcel",
        "max_age_s = 1",
    );
    world.start(Party::Service).await;
    let sender = world.raw("payment");
    let mut parcels = Vec::new();
    for _ in 0..5 {
        let parcel = message("parcel");
        sender.publish(&parcel).await;
        parcels.push(parcel.id);
    }
    world.stop(Party::Service).await;
    let db = world.database("service").await;
    eventually("the parcels are too old", SOON, async || {
        let young = format!(
            "SELECT count(*) FROM delivery WHERE confirmed_at >= {}",
            db.ago(1_000)
        );
        let young = number(&db, &young).await;
        (young == 0)
            .then_some(())
            .ok_or_else(|| format!("{young} are not"))
    })
    .await;
    db.close().await;
    // The subscriptions are looked at in the order of their names; this is the first.
    world.start_to_die(Party::Service, point, 1).await;
    world.died_at(Party::Service, point).await;
    let dead = |books: &Books| {
        books
            .deliveries
            .iter()
            .filter(|d| d.state == "DEAD")
            .count()
    };
    let given_up = dead(&world.books().await);
    let expected = if point == Point::RECOVER_AFTER_COMMIT {
        5
    } else {
        0
    };
    assert_eq!(given_up, expected, "DEAD at the moment of death");

    world.start_all().await;
    assert_eq!(
        world.payments().pay_all(&orders("a", ORDERS)).await,
        (20, 5)
    );
    let mut books = world.drained().await;
    assert_eq!(dead(&books), 5, "each parcel once");
    books.deliveries.retain(|d| d.subscription != "a-courier");
    books.messages.retain(|m| !parcels.contains(&m.id));
    books.hold(FLOOR);
}

/// The service dies while it removes what is finished.
async fn retire(engines: Engines, point: Point) {
    let mut world = World::new(engines).await;
    world.config = world.config.clone().server("bucket_s", 1);
    world.start_all().await;
    assert_eq!(
        world.payments().pay_all(&orders("a", ORDERS)).await,
        (20, 5)
    );
    world.drained().await.hold(FLOOR);
    let db = world.database("service").await;
    eventually("the first bucket is behind its time", SOON, async || {
        let behind = format!(
            "SELECT count(*) FROM body_bucket
              WHERE number > (SELECT max(bucket) FROM message) AND opens_at < {}",
            db.ago(1_000)
        );
        let behind = number(&db, &behind).await;
        (behind > 0)
            .then_some(())
            .ok_or_else(|| "its successor is new".to_owned())
    })
    .await;
    let before = number(&db, "SELECT count(*) FROM message").await;
    // On a busy machine some were over before the first payment came.
    let empty = "SELECT count(*) FROM body_bucket
                  WHERE number < (SELECT min(bucket) FROM message)";
    let empty = u32::try_from(number(&db, empty).await).expect("a count");
    world.stop(Party::Service).await;
    if engines == Engines::Production {
        // Else the clock is read in the turn of the process before.
        let due = "SELECT count(*) FROM turn
                    WHERE pass = 'retention' AND due_at <= clock_timestamp()";
        eventually("the first run has its turn", SOON, async || {
            let due = number(&db, due).await == 1;
            due.then_some(()).ok_or_else(|| "it is not due".to_owned())
        })
        .await;
    }
    db.close().await;
    world.config = world.config.clone().server("retention_s", 1);
    // The first run opens buckets and reads the clock, the second opens and then removes, bucket
    // by bucket.
    world.start_to_die(Party::Service, point, 3 + empty).await;
    world.died_at(Party::Service, point).await;
    let db = world.database("service").await;
    let after = number(&db, "SELECT count(*) FROM message").await;
    db.close().await;
    match point == Point::RETIRE_AFTER_COMMIT {
        true => assert!(after < before, "what was removed stays removed"),
        false => assert_eq!(after, before, "nothing was committed"),
    }
    world.start(Party::Service).await;
    let db = world.database("service").await;
    eventually("all that is finished is gone", SOON, async || {
        let left = number(&db, "SELECT count(*) FROM message").await;
        (left == 0)
            .then_some(())
            .ok_or_else(|| format!("{left} messages are left"))
    })
    .await;
    db.close().await;
    assert_eq!(
        world.payments().pay_all(&orders("b", ORDERS)).await,
        (20, 5)
    );
    let mut books = world.drained().await;
    books.forgetful = true;
    books.hold(Floor {
        paid: 40,
        refused: 10,
        ..FLOOR
    });
}

/// A topology is half applied when the service dies.
async fn topology(engines: Engines, point: Point) {
    let mut world = World::running(engines).await;
    assert_eq!(
        world.payments().pay_all(&orders("a", ORDERS)).await,
        (20, 5)
    );
    world.stop(Party::Service).await;
    world.config = world.config.clone().publisher("newcomer").topic("novelty");
    world.config.version = 2;
    world.start_to_die(Party::Service, point, 1).await;
    world.died_at(Party::Service, point).await;
    let db = world.database("service").await;
    let version = number(&db, "SELECT topology_version FROM store").await;
    let topics = number(&db, "SELECT count(*) FROM topic WHERE name = 'novelty'").await;
    db.close().await;
    let applied = i64::from(point == Point::TOPOLOGY_AFTER_COMMIT);
    assert_eq!(
        (version, topics),
        (1 + applied, applied),
        "whole or not at all"
    );

    world.start(Party::Service).await;
    assert_eq!(
        world.payments().pay_all(&orders("b", ORDERS)).await,
        (20, 5)
    );
    world.drained().await.hold(Floor {
        paid: 40,
        refused: 10,
        ..FLOOR
    });
    let db = world.database("service").await;
    let version = number(&db, "SELECT topology_version FROM store").await;
    db.close().await;
    assert_eq!(version, 2);
}

/// Facts that are already true are published while the service dies.
async fn publish(engines: Engines, point: Point) {
    let config = Config::empty()
        .publisher("weather")
        .topic("rain")
        .subscription("garden", "rain");
    let mut world = World::bare(engines, config);
    world.start_to_die(Party::Service, point, 5).await;
    let raw = world.raw("weather");
    let facts: Vec<_> = (0..20).map(|_| message("rain")).collect();
    let publishing = async {
        for fact in &facts {
            raw.publish(fact).await;
        }
    };
    let death = async {
        world.died_at(Party::Service, point).await;
        let kept = world.books().await.messages.len();
        let durable = if point == Point::PUBLISH_AFTER_COMMIT {
            5
        } else {
            4
        };
        assert_eq!(kept, durable, "the fifth was durable or not");
        world.start(Party::Service).await;
    };
    tokio::join!(publishing, death);

    let mut garden = world.reader("rain", "garden").await;
    let mut seen: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
    // What was on its way when the service died may come twice.
    while seen.len() < facts.len() {
        let taken = garden.takes().await;
        let fact = facts.iter().find(|fact| fact.id == taken.message_id);
        let fact = fact.unwrap_or_else(|| panic!("{} is new", name_of(&taken.message_id)));
        assert_eq!(fact.payload, taken.payload);
        *seen.entry(taken.message_id).or_default() += 1;
    }
    let books = world.drained().await;
    books.one_decision();
    assert_eq!(
        books.messages.len(),
        20,
        "each fact once, though it was published again"
    );
}
