//! Two message services on one PostgreSQL and one RabbitMQ, of which one is frozen or killed.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use handfast_producer::{Message, Producer};
use handfast_proto::v1::{Replica, ReplicasRequest};
use handfast_tests::database::number;
use handfast_tests::proxy::Way;
use handfast_tests::{Books, Config, Engines, Floor, Merchants, Party, World, eventually};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(20);
/// More than three leases of the test timers.
const FREEZE: Duration = Duration::from_secs(7);
pub(crate) const REPLICA: &str = "replica";

/// Waits until so many more payments were rewarded.
pub(crate) async fn rewarded(world: &World, more: usize) {
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
    let (orders, ()) = tokio::join!(payments.pay_until(&over), faults);
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

#[tokio::test]
async fn both_are_killed_in_a_loop_and_each_is_back_within_5_s() {
    const KILLS: usize = 10;
    const BACK: Duration = Duration::from_secs(5);
    let mut world = World::new(Engines::Production).await;
    world.replicated = true;
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    world.start_all().await;
    let merchants = Merchants::of(world.payments());
    let kills = async {
        for _ in 0..KILLS {
            rewarded(&world, 20).await;
            world.kill(Party::Service).await;
            let killed = Instant::now();
            world.start(Party::Service).await;
            assert!(killed.elapsed() < BACK, "took {:?}", killed.elapsed());
            rewarded(&world, 20).await;
            world.kill_process(REPLICA).await;
            let killed = Instant::now();
            world.start_replica(REPLICA).await;
            assert!(killed.elapsed() < BACK, "took {:?}", killed.elapsed());
        }
        merchants.stop();
    };
    tokio::join!(kills, merchants.ask("a"));
    let books = world.drained().await;
    let history = merchants.into_history();
    eprintln!("{:?}, {} repeats", history.outcomes(), books.repeats());
    history.agrees_with(&books);
    books.hold(Floor {
        paid: 400,
        refused: 50,
        ..Floor::default()
    });
}

#[tokio::test]
async fn what_a_frozen_replica_holds_is_taken_over_within_one_and_a_half_leases() {
    const LEASE: Duration = Duration::from_secs(4);
    const HELD: i64 = 20;
    let config = Config::empty()
        .server("lease_ms", LEASE.as_millis())
        .server("resend_after_ms", 6_000)
        .server("publisher_confirm_ms", 3_000)
        .publisher("source")
        .topic("fact")
        .subscription("sink", "fact");
    let mut world = World::bare(Engines::Production, config);
    world.start(Party::Service).await;
    let (link, url) = world.proxied_rabbitmq().await;
    let arguments = ["--broker", &url];
    world.start_replica_with(REPLICA, &arguments).await;
    let producer = Producer::connect(world.replica_url(), "source").await;
    let producer = producer.unwrap();
    let mut sink = world.queue_consumer("sink").await;
    producer.publish(&Message::new("fact")).await.unwrap();
    let (first, tag) = sink.next().await;
    sink.consumed(&first, tag).await;
    let db = world.database("service").await;
    let count = async |what: &str| {
        let count = format!("SELECT count(*) FROM delivery WHERE {what}");
        number(&db, &count).await
    };
    eventually("the first is consumed", SOON, async || {
        let consumed = count("state = 'CONSUMED'").await;
        (consumed == 1)
            .then_some(())
            .ok_or_else(|| "it is not".to_owned())
    })
    .await;

    // The replica can send nothing, so what it has leased it still holds when it stops.
    link.swallows(Way::There, true);
    for _ in 0..HELD {
        producer.publish(&Message::new("fact")).await.unwrap();
    }
    world.process(REPLICA).signal(Signal::SIGSTOP);
    let frozen = Instant::now();
    assert_eq!(count("state = 'PENDING' AND token IS NOT NULL").await, HELD);
    eventually("something is taken over", SOON, async || {
        let taken_over = count("generation > 1").await;
        (taken_over > 0)
            .then_some(())
            .ok_or_else(|| taken_over.to_string())
    })
    .await;
    let after = frozen.elapsed();
    eprintln!("taken over after {after:?}");
    assert!(after <= LEASE * 3 / 2, "{after:?}");
    let mut ids = BTreeSet::new();
    for _ in 0..HELD {
        let (fact, tag) = sink.next().await;
        assert_eq!(fact.generation, 2, "the second send, by the other one");
        assert!(ids.insert(fact.message_id.clone()), "each once");
        sink.consumed(&fact, tag).await;
    }

    // It wakes up far behind its leases, and changes nothing of what the other one did. What
    // RabbitMQ gave it of the answers, it writes now.
    tokio::time::sleep((LEASE * 3).saturating_sub(frozen.elapsed())).await;
    world.process(REPLICA).signal(Signal::SIGCONT);
    link.swallows(Way::There, false);
    link.cuts();
    producer.publish(&Message::new("fact")).await.unwrap();
    let (fact, tag) = sink.next().await;
    assert!(!ids.contains(&fact.message_id), "nothing comes again");
    sink.consumed(&fact, tag).await;
    eventually("all is consumed", SOON, async || {
        let consumed = count("state = 'CONSUMED'").await;
        (consumed == HELD + 2)
            .then_some(())
            .ok_or_else(|| consumed.to_string())
    })
    .await;
    let sound = "state = 'CONSUMED' AND generation = 2 AND attempts = 0 AND token IS NULL";
    assert_eq!(count(sound).await, HELD);
    db.close().await;
}

#[tokio::test]
async fn the_console_lists_both_replicas_until_they_end() {
    let config = Config::empty()
        .publisher("source")
        .topic("fact")
        .subscription("sink", "fact");
    let mut world = World::bare(Engines::Production, config);
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    let mut console = world.console();
    let mut replicas = async || {
        let replicas = console.replicas(ReplicasRequest {}).await;
        replicas.unwrap().into_inner().replicas
    };
    let [service, replica] = [world.service_url(), world.replica_url()]
        .map(|url| url.trim_start_matches("http://").to_owned());
    let mut first = Vec::new();
    eventually("both are listed", SOON, async || {
        first = replicas().await;
        (first.len() == 2)
            .then_some(())
            .ok_or_else(|| format!("{first:?}"))
    })
    .await;
    assert_eq!(
        first.iter().map(|r| &r.address).collect::<Vec<_>>(),
        [&service, &replica]
    );
    assert!(
        first
            .iter()
            .all(|r| !r.version.is_empty() && r.started_at <= r.seen_at)
    );

    // It is frozen with what it holds, and seen no more, but not forgotten.
    world.process(REPLICA).signal(Signal::SIGSTOP);
    let seen = |all: &[Replica], address: &str| {
        let found = all.iter().find(|r| r.address == address);
        found.map(|r| r.seen_at)
    };
    let mut seen_of_replica = Vec::new();
    // What it had said when it stopped may be written behind that, but not a second later.
    for _ in 0..2 {
        let before = replicas().await;
        eventually("the other one is seen again", SOON, async || {
            let now = replicas().await;
            (seen(&now, &service) > seen(&before, &service))
                .then_some(())
                .ok_or_else(|| format!("{now:?}"))
        })
        .await;
        seen_of_replica.push(seen(&replicas().await, &replica).unwrap());
    }
    assert_eq!(seen_of_replica[0], seen_of_replica[1]);
    world.process(REPLICA).signal(Signal::SIGCONT);
    world.stop_process(REPLICA).await;
    let left = replicas().await;
    assert_eq!(left.len(), 1, "who ends in good order says so");
    assert_eq!(left[0].address, service);
}

#[tokio::test]
async fn a_new_topology_is_known_to_the_other_replica_within_two_seconds() {
    const KNOWN: Duration = Duration::from_secs(2);
    let mut world = World::bare(Engines::Production, Config::empty().publisher("source"));
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    let producer = Producer::connect(world.replica_url(), "source").await;
    let producer = producer.unwrap();
    let novelty = Message::new("novelty");
    producer.publish(&novelty).await.unwrap_err();
    world.stop(Party::Service).await;
    world.config = world.config.clone().topic_for_nobody("novelty");
    world.config.version = 2;
    world.start(Party::Service).await;
    let applied = Instant::now();
    eventually("the other one takes the new topic", SOON, async || {
        let published = producer.publish(&novelty).await;
        published.map(drop).map_err(|error| error.to_string())
    })
    .await;
    let took = applied.elapsed();
    eprintln!("known after {took:?}");
    assert!(took <= KNOWN, "{took:?}");
}

#[tokio::test]
async fn the_passes_run_once_per_interval_whichever_replica_is_left() {
    const WINDOW: Duration = Duration::from_secs(6);
    // Where deliveries may grow too old, there is always something to look at.
    let config = Config::empty().publisher("source").topic("parcel");
    let config = config.subscription_with("a-courier", "parcel", "max_age_s = 3600");
    let mut world = World::bare(Engines::Production, config);
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    let db = world.database("service").await;
    let turns = async || number(&db, "SELECT taken FROM turn WHERE pass = 'recovery'").await;
    let counted = async |who: &str| {
        let (before, began) = (turns().await, Instant::now());
        tokio::time::sleep(WINDOW).await;
        let taken = turns().await - before;
        // They are a second apart, a little more where the next one was just about to ask.
        let most = began.elapsed().as_secs() as i64 + 1;
        assert!((4..=most).contains(&taken), "{who}: {taken} in {WINDOW:?}");
    };
    counted("both").await;
    let replica = world.process(REPLICA);
    replica.signal(Signal::SIGSTOP);
    counted("the first alone").await;
    replica.signal(Signal::SIGCONT);
    world.freeze(Party::Service);
    counted("the second alone").await;
    world.thaw(Party::Service);
    world.kill_process(REPLICA).await;
    counted("the first again").await;
    let unknown = "SELECT count(*) FROM turn WHERE taken_by NOT IN (SELECT id FROM replica)";
    assert_eq!(number(&db, unknown).await, 0);
    db.close().await;
}
