//! A message service is there soon after its start, however much is unfinished.

use std::time::{Duration, Instant};

use handfast_producer::{Message, Producer};
use handfast_tests::database::number;
use handfast_tests::{Config, Engines, Party, World};
use tokio::task::JoinSet;

const UNFINISHED: usize = 100_000;
/// Calls at the same time.
const AT_A_TIME: usize = 2_000;
const STARTS: usize = 10;
/// From exec to SERVING, the median.
const SOON: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_unfinished_messages_do_not_delay_a_start() {
    let config = Config::with_usual_timers()
        .publisher("source")
        .topic("fact")
        .usual_subscription("nobody", "fact");
    let mut world = World::bare(Engines::Production, config);
    world.start(Party::Service).await;
    let producer = Producer::connect(world.service_url(), "source").await;
    let producer = producer.unwrap();
    let mut calls = JoinSet::new();
    for _ in 0..UNFINISHED {
        if calls.len() == AT_A_TIME {
            calls.join_next().await.unwrap().unwrap();
        }
        let producer = producer.clone();
        let message = Message::new("fact").payload("text/plain", vec![b'x'; 100]);
        calls.spawn(async move {
            producer.publish(&message).await.unwrap();
        });
    }
    calls.join_all().await;
    let db = world.database("service").await;
    let open = "SELECT count(*) FROM delivery WHERE state IN ('PENDING', 'SENT')";
    let mut took = Vec::new();
    for _ in 0..STARTS {
        world.kill(Party::Service).await;
        assert_eq!(number(&db, open).await as usize, UNFINISHED);
        let began = Instant::now();
        world.start(Party::Service).await;
        took.push(began.elapsed());
    }
    db.close().await;
    took.sort_unstable();
    eprintln!("from exec to SERVING: {took:?}");
    assert!(took[STARTS / 2] < SOON, "{took:?}");
}
