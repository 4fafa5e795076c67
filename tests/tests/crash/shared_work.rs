//! Two message services under load: each does its share, nothing comes twice, and a rolling restart
//! is not noticed by who produces and who consumes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use handfast_producer::{Message, Producer};
use handfast_tests::database::number;
use handfast_tests::proxy::Way;
use handfast_tests::{Config, Engines, Party, World, eventually};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "fact";
const SUBSCRIPTIONS: [&str; 2] = ["left", "right"];
const REPLICA: &str = "replica";
/// Of one message; what is sent in all is most of what a service says to RabbitMQ.
const PAYLOAD: usize = 1_024;
/// The least share of each service.
const SHARE: f64 = 0.2;
/// Copies that are too many, of all.
const COPIES: f64 = 0.001;
/// The slowest of a hundred from publish to consumer, also while services restart.
const SLOWEST: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(60);
/// Answers of one message.
const BATCH: usize = 500;
const QUIET: Duration = Duration::from_secs(2);

/// Services with the timers that they have when nobody sets them.
fn world() -> World {
    let mut config = Config::with_usual_timers().publisher("source").topic(TOPIC);
    for subscription in SUBSCRIPTIONS {
        config = config.usual_subscription(subscription, TOPIC);
    }
    World::bare(Engines::Production, config)
}

/// Publishes at a steady pace, however long each takes, and says how many. Every call must
/// succeed. The payload says when it was to be published.
async fn load(urls: String, began: Instant, per_s: u32, time: Duration) -> usize {
    let producer = Producer::connect(urls, "source").await;
    let producer = producer.expect("two addresses");
    let all = per_s as usize * usize::try_from(time.as_secs()).expect("some seconds");
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    let mut calls = JoinSet::new();
    for _ in 0..all / (per_s as usize / 100) {
        pace.tick().await;
        for _ in 0..per_s / 100 {
            let producer = producer.clone();
            let payload = format!("{:PAYLOAD$}", began.elapsed().as_micros());
            let message = Message::new(TOPIC).payload("text/plain", payload);
            calls.spawn(async move { producer.publish(&message).await });
        }
        while let Some(done) = calls.try_join_next() {
            let published = done.expect("no panic");
            published.expect("a publish succeeds");
        }
    }
    for done in calls.join_all().await {
        done.expect("a publish succeeds");
    }
    all
}

/// What came for one subscription.
struct Got {
    copies: HashMap<Vec<u8>, usize>,
    /// From publish to here, of the first copies.
    took: Vec<Duration>,
}

impl Got {
    fn all(&self) -> usize {
        self.copies.values().sum()
    }

    fn slowest_of_a_hundred(&mut self) -> Duration {
        self.took.sort_unstable();
        self.took[self.took.len() * 99 / 100]
    }
}

/// Takes and answers everything for these, until nothing comes and it is over.
async fn consume(
    world: &World,
    subscriptions: &[&str],
    began: Instant,
    over: &CancellationToken,
) -> JoinSet<Got> {
    let mut reading = JoinSet::new();
    for subscription in subscriptions {
        let mut queue = world.queue_consumer(subscription).await;
        let over = over.clone();
        reading.spawn(async move {
            let mut got = Got {
                copies: HashMap::new(),
                took: Vec::new(),
            };
            loop {
                let batch = queue.batch_within(BATCH, QUIET).await;
                if batch.is_empty() && over.is_cancelled() {
                    return got;
                }
                let now = began.elapsed();
                for (fact, _) in &batch {
                    let copies = got.copies.entry(fact.message_id.clone()).or_default();
                    *copies += 1;
                    if *copies == 1 {
                        let said = String::from_utf8_lossy(&fact.payload);
                        let sent = Duration::from_micros(said.trim().parse().expect("a time"));
                        got.took.push(now - sent);
                    }
                }
                queue.all_consumed(&batch).await;
            }
        });
    }
    reading
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_share_a_thousand_messages_a_second_and_send_none_twice() {
    let mut world = world();
    let (first, first_url) = world.proxied_rabbitmq().await;
    let (second, second_url) = world.proxied_rabbitmq().await;
    let environment = &mut world.service_environment;
    environment.insert("HANDFAST_BROKER".to_owned(), first_url);
    world.start(Party::Service).await;
    let arguments = ["--broker", &second_url];
    world.start_replica_with(REPLICA, &arguments).await;

    let (began, over) = (Instant::now(), CancellationToken::new());
    let reading = consume(&world, &SUBSCRIPTIONS, began, &over).await;
    let published = load(world.replicated_url(), began, 1_000, MINUTE).await;
    world.until_all_consumed(DRAIN).await;
    over.cancel();
    for got in reading.join_all().await {
        let (all, distinct) = (got.all(), got.copies.len());
        eprintln!("{all} copies of {distinct} messages");
        assert_eq!(distinct, published);
        let too_many = (all - distinct) as f64 / distinct as f64;
        assert!(too_many < COPIES, "{all} copies of {distinct} messages");
    }
    let said = [&first, &second].map(|proxy| proxy.carried(Way::There) as f64);
    let share = said.map(|bytes| bytes / said.iter().sum::<f64>());
    eprintln!("shares: {share:?} of {said:?} bytes");
    assert!(said.iter().sum::<f64>() > (2 * published * PAYLOAD) as f64);
    assert!(share.iter().all(|share| *share >= SHARE), "{share:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_fails_no_call_and_delays_nothing() {
    const TIME: Duration = Duration::from_secs(20);
    let mut world = world();
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    let (began, over) = (Instant::now(), CancellationToken::new());
    let reading = consume(&world, &SUBSCRIPTIONS, began, &over).await;
    let loading = tokio::spawn(load(world.replicated_url(), began, 500, TIME));
    let mut restarts = 0;
    while began.elapsed() < TIME * 3 / 4 {
        world.stop(Party::Service).await;
        world.start(Party::Service).await;
        world.stop_process(REPLICA).await;
        world.start_replica(REPLICA).await;
        restarts += 1;
    }
    let published = loading.await.unwrap();
    world.until_all_consumed(DRAIN).await;
    over.cancel();
    assert!(restarts >= 2, "{restarts} rolling restarts");
    for mut got in reading.join_all().await {
        let (all, distinct) = (got.all(), got.copies.len());
        let slowest = got.slowest_of_a_hundred();
        eprintln!("{restarts} restarts, {all} copies of {distinct}, p99 {slowest:?}");
        assert_eq!(distinct, published);
        assert!(slowest < SLOWEST, "{slowest:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_comes_gets_everything_and_one_that_goes_leaves_nothing_open() {
    const TIME: Duration = Duration::from_secs(15);
    let mut world = world();
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    let (began, over) = (Instant::now(), CancellationToken::new());
    let reading = consume(&world, &SUBSCRIPTIONS, began, &over).await;
    let loading = tokio::spawn(load(world.replicated_url(), began, 300, TIME));
    let db = world.database("service").await;
    let some = "SELECT count(*) FROM delivery WHERE subscription = 'right' AND state = 'CONSUMED'";
    eventually("the load is there", DRAIN, async || {
        let consumed = number(&db, some).await;
        (consumed > 500)
            .then_some(())
            .ok_or_else(|| consumed.to_string())
    })
    .await;

    world.config = Config::with_usual_timers()
        .publisher("source")
        .topic(TOPIC)
        .usual_subscription("left", TOPIC)
        .usual_subscription("newcomer", TOPIC);
    world.config.version = 2;
    world.stop(Party::Service).await;
    world.start(Party::Service).await;
    let now = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)";
    let active = number(&db, now).await;
    let newcomer = consume(&world, &["newcomer"], began, &over).await;
    world.stop_process(REPLICA).await;
    world.start_replica(REPLICA).await;
    let published = loading.await.unwrap();

    let open = "SELECT count(*) FROM delivery WHERE state IN ('PENDING', 'SENT')";
    eventually("nothing is open", DRAIN, async || {
        let open = number(&db, open).await;
        (open == 0).then_some(()).ok_or_else(|| open.to_string())
    })
    .await;
    over.cancel();
    let confirmed = format!(
        "FROM message m WHERE m.decided_at > to_timestamp({active} / 1000000.0) AND NOT EXISTS (
            SELECT FROM delivery d WHERE d.message_id = m.id AND d.subscription = 'newcomer')"
    );
    let missed = number(&db, &format!("SELECT count(*) {confirmed}")).await;
    assert_eq!(missed, 0, "confirmed after it became active");
    let of = |what: &str| format!("SELECT count(*) FROM delivery WHERE subscription = {what}");
    let created = number(&db, &of("'newcomer'")).await;
    assert!(created > 500, "{created} came for the newcomer");
    let lost = of("'newcomer' AND state <> 'CONSUMED'");
    assert_eq!(number(&db, &lost).await, 0);
    let of_right = of("'right' AND state NOT IN ('CONSUMED', 'SKIPPED')");
    assert_eq!(number(&db, &of_right).await, 0);
    let of_left = of("'left' AND state = 'CONSUMED'");
    assert_eq!(number(&db, &of_left).await as usize, published);
    db.close().await;
    let [got] = &newcomer.join_all().await[..] else {
        panic!("one newcomer");
    };
    assert_eq!(got.copies.len(), usize::try_from(created).unwrap());
    drop(reading.join_all().await);
}
