//! Nothing is SENT that RabbitMQ does not have, whenever the service dies. On RabbitMQ only; the
//! embedded broker keeps nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use handfast_fail_points::Point;
use handfast_tests::clients::{Raw, message, name_of};
use handfast_tests::{Config, Engines, Party, World, eventually};

const TOPIC: &str = "fact";
const SOON: Duration = Duration::from_secs(20);
/// The pace of the publisher: what it sends in all is less than a consumer may hold.
const PACE: Duration = Duration::from_millis(5);
/// Nothing more comes from a queue that was quiet for so long.
const QUIET: Duration = Duration::from_secs(1);

/// Publishes until the service has died.
async fn publish_until_dead(world: &mut World, source: &Raw, point: Point) {
    let mut pace = tokio::time::interval(PACE);
    let publishing = async {
        loop {
            pace.tick().await;
            source.publish(&message(TOPIC)).await;
        }
    };
    tokio::select! {
        () = publishing => {}
        () = world.died_at(Party::Service, point) => {}
    }
}

/// Of what is SENT by the books of a service that is dead, RabbitMQ has everything.
async fn what_is_sent_is_there(world: &World) -> usize {
    let waiting = world.waiting("sink").await;
    assert!(waiting < 2_000, "a consumer gets no more than that");
    let mut queue = world.queue_consumer("sink").await;
    let mut there = BTreeSet::new();
    for _ in 0..waiting {
        there.insert(queue.next().await.0.message_id);
    }
    // What was on its way while they were counted.
    while let Some((fact, _)) = queue.next_within(QUIET).await {
        there.insert(fact.message_id);
    }
    // What was not acked goes back.
    queue.close().await;
    let books = world.books().await;
    let sent: Vec<_> = books
        .deliveries
        .iter()
        .filter(|d| d.state == "SENT")
        .collect();
    for delivery in &sent {
        let name = name_of(&delivery.message_id);
        assert!(there.contains(&delivery.message_id), "{name} is not there");
    }
    sent.len()
}

#[tokio::test]
async fn nothing_is_sent_that_rabbitmq_does_not_have() {
    let config = Config::empty()
        .publisher("source")
        .topic(TOPIC)
        .subscription("sink", TOPIC);
    let mut world = World::bare(Engines::Production, config);
    let source = world.raw("source");
    for (point, nth) in [
        (Point::RELAY_HANDED, 10),
        (Point::RELAY_CONFIRMED, 10),
        (Point::SENT_BEFORE_COMMIT, 2),
        (Point::SENT_AFTER_COMMIT, 2),
    ] {
        world.start_to_die(Party::Service, point, nth).await;
        publish_until_dead(&mut world, &source, point).await;
    }
    let sent = what_is_sent_is_there(&world).await;
    assert!(sent > 0, "nothing was SENT");

    world.start(Party::Service).await;
    eventually("everything is SENT", SOON, async || {
        let books = world.books().await;
        let open = books.deliveries.iter().find(|d| d.state != "SENT");
        open.map_or(Ok(()), |delivery| Err(format!("{delivery:?}")))
    })
    .await;
    world.kill(Party::Service).await;
    let all = what_is_sent_is_there(&world).await;
    assert_eq!(all, world.books().await.messages.len());
    assert!(all > sent, "some were sent after the last death");
}
