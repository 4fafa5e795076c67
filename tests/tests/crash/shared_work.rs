//! Two message services under a load of a thousand messages a second: each does its share, and
//! nothing comes twice.

use std::collections::HashMap;
use std::time::Duration;

use handfast_producer::{Message, Producer};
use handfast_tests::database::number;
use handfast_tests::proxy::Way;
use handfast_tests::{Config, Engines, Party, World, eventually};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "fact";
const SUBSCRIPTIONS: [&str; 2] = ["left", "right"];
const PER_S: u32 = 1_000;
const LOAD: Duration = Duration::from_secs(60);
/// Of one message; what is sent in all is most of what a service says to RabbitMQ.
const PAYLOAD: usize = 1_024;
/// The least share of each service.
const SHARE: f64 = 0.2;
/// Copies that are too many, of all.
const COPIES: f64 = 0.001;
const DRAIN: Duration = Duration::from_secs(60);
/// Answers of one message.
const BATCH: usize = 500;
const QUIET: Duration = Duration::from_secs(2);

/// Publishes at a steady pace, however long each takes.
async fn publish_all(producer: &Producer) -> usize {
    let all = PER_S as usize * usize::try_from(LOAD.as_secs()).unwrap();
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    let mut calls = JoinSet::new();
    let mut published = 0;
    while published < all {
        pace.tick().await;
        for _ in 0..PER_S / 100 {
            let producer = producer.clone();
            let message = Message::new(TOPIC).payload("text/plain", vec![b'x'; PAYLOAD]);
            calls.spawn(async move { producer.publish(&message).await });
            published += 1;
        }
        while let Some(done) = calls.try_join_next() {
            done.unwrap().unwrap();
        }
    }
    for done in calls.join_all().await {
        done.unwrap();
    }
    published
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_share_a_thousand_messages_a_second_and_send_none_twice() {
    let mut config = Config::with_usual_timers().publisher("source").topic(TOPIC);
    for subscription in SUBSCRIPTIONS {
        config = config.usual_subscription(subscription, TOPIC);
    }
    let mut world = World::bare(Engines::Production, config);
    let (first, first_url) = world.proxied_rabbitmq().await;
    let (second, second_url) = world.proxied_rabbitmq().await;
    let environment = &mut world.service_environment;
    environment.insert("HANDFAST_BROKER".to_owned(), first_url);
    world.start(Party::Service).await;
    world
        .start_replica_with("replica", &["--broker", &second_url])
        .await;

    let over = CancellationToken::new();
    let mut reading = JoinSet::new();
    for subscription in SUBSCRIPTIONS {
        let mut queue = world.queue_consumer(subscription).await;
        let over = over.clone();
        reading.spawn(async move {
            let mut copies: HashMap<Vec<u8>, usize> = HashMap::new();
            loop {
                let batch = queue.batch_within(BATCH, QUIET).await;
                if batch.is_empty() && over.is_cancelled() {
                    return copies;
                }
                for (fact, _) in &batch {
                    *copies.entry(fact.message_id.clone()).or_default() += 1;
                }
                queue.all_consumed(&batch).await;
            }
        });
    }
    let producer = Producer::connect(world.replicated_url(), "source").await;
    let published = publish_all(&producer.unwrap()).await;
    let db = world.database("service").await;
    eventually("everything is consumed", DRAIN, async || {
        let open = "SELECT count(*) FROM delivery WHERE state <> 'CONSUMED'";
        let open = number(&db, open).await;
        (open == 0)
            .then_some(())
            .ok_or_else(|| format!("{open} are not"))
    })
    .await;
    db.close().await;
    over.cancel();
    for copies in reading.join_all().await {
        let (all, distinct): (usize, usize) = (copies.values().sum(), copies.len());
        assert_eq!(distinct, published);
        let too_many = (all - distinct) as f64 / distinct as f64;
        eprintln!("{all} copies of {distinct} messages");
        assert!(too_many < COPIES, "{all} copies of {distinct} messages");
    }
    let said = [&first, &second].map(|proxy| proxy.carried(Way::There) as f64);
    let share = said.map(|bytes| bytes / said.iter().sum::<f64>());
    eprintln!("shares: {share:?} of {said:?} bytes");
    assert!(said.iter().sum::<f64>() > (2 * published * PAYLOAD) as f64);
    assert!(share.iter().all(|share| *share >= SHARE), "{share:?}");
}
