//! Between the consumer and RabbitMQ: the contract, acks, lost connections, the end.

use std::time::Duration;

use handfast_consumer::{Consumer, Error, Report, rabbitmq};
use lapin::types::{AMQPValue, FieldTable, LongString};
use sqlx::Postgres;
use tokio_util::sync::CancellationToken;

use crate::common::{PATIENCE, Proxy, Rabbit, Running, World};

async fn world() -> World<Postgres> {
    World::new().await
}

async fn start(world: &World<Postgres>, rabbit: &Rabbit) -> Running {
    world.start_with(world.subscriber_of(rabbit.source()).await)
}

#[tokio::test]
async fn every_kind_of_answer_arrives_as_the_contract_says() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let words = ["ok", "fail", "later", "reject", "panic", "ok"];
    let messages = (1..)
        .zip(words)
        .map(|(n, word)| (rabbit.properties(n, 3), word));
    rabbit.send(messages.collect()).await;
    let running = start(&world, &rabbit).await;
    rabbit.until_answers(words.len()).await;
    let report = world.stop(running).await;

    let mut answers = rabbit.answers();
    answers.sort_by_key(|answer| answer.number);
    for answer in &answers {
        assert_eq!((answer.generation, answer.sent_at), (3, world.now + 7));
    }
    let said: Vec<_> = answers
        .iter()
        .map(|a| (a.word.as_str(), a.reason.as_deref(), a.after_ms))
        .collect();
    let expected = [
        ("CONSUMED", None, None),
        ("FAILED", Some("told to fail"), None),
        ("LATER", None, Some(1_500)),
        ("REJECTED", Some("told to reject"), None),
        ("FAILED", Some("handler panicked: told to panic"), None),
        ("CONSUMED", None, None),
    ];
    assert_eq!(said, expected);
    assert_eq!((report.consumed, report.unanswered), (2, 0));
    // Every answer ends in an ack: nothing came back when the consumer left.
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_delivery_is_acked_only_after_its_answer_was_confirmed() {
    let world = world().await;
    let rabbit = Rabbit::new(world.now).await;
    rabbit.declare_deliveries().await;
    rabbit.deliver(1, "ok").await;
    let first = start(&world, &rabbit).await;
    world.until_effects(1).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // Its answers were returned, because there is no queue for them.
    rabbit.until_queue(1, 0).await;

    rabbit.declare_answers().await;
    let second = start(&world, &rabbit).await;
    rabbit.until_answers(1).await;
    let report = world.stop(second).await;
    assert_eq!((report.consumed, report.duplicates), (0, 1));
    assert_eq!(rabbit.words(1), ["CONSUMED"]);
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 2));
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn answers_wait_for_their_queue_while_consuming_goes_on() {
    let world = world().await;
    let rabbit = Rabbit::new(world.now).await;
    rabbit.declare_deliveries().await;
    rabbit.deliver_all(1..=5).await;
    let running = start(&world, &rabbit).await;
    world.until_effects(5).await;
    rabbit.deliver_all(6..=9).await;
    world.until_effects(9).await;
    rabbit.declare_answers().await;
    rabbit.until_answers(9).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (9, 0));
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_copy_of_another_generation_is_answered_consumed_again() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let running = start(&world, &rabbit).await;
    rabbit
        .send(vec![
            (rabbit.properties(1, 1), "ok"),
            (rabbit.properties(1, 2), "ok"),
        ])
        .await;
    rabbit.until_answers(2).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.duplicates), (1, 1));
    let answers = rabbit.answers();
    let mut generations: Vec<_> = answers.iter().map(|a| a.generation).collect();
    generations.sort_unstable();
    assert_eq!(generations, [1, 2]);
    assert_eq!(rabbit.words(1), ["CONSUMED", "CONSUMED"]);
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_message_that_cannot_be_read_does_not_block_the_queue() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let good = rabbit.properties(1, 1);
    let with = |name: &str, value: Option<AMQPValue>| {
        let mut headers = FieldTable::default();
        for (known, kept) in good.headers().as_ref().unwrap() {
            if known.as_str() != name {
                headers.insert(known.clone(), kept.clone());
            }
        }
        if let Some(value) = value {
            headers.insert(name.into(), value);
        }
        good.clone().with_headers(headers)
    };
    let points = AMQPValue::LongString(LongString::from("points"));
    let broken = vec![
        (good.clone().with_message_id("17".into()), "ok"),
        (with("handfast-generation", None), "ok"),
        (with("handfast-sent-at", None), "ok"),
        (with("handfast-subscription", Some(points)), "ok"),
        (lapin::BasicProperties::default(), "hello"),
    ];
    let number = broken.len() as u64;
    rabbit.send(broken).await;
    rabbit.deliver(2, "ok").await;
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let running = world.start_with(subscriber.prefetch(1));
    rabbit.until_answers(1).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unreadable), (1, number));
    assert_eq!((report.unanswered, world.all_effects().await), (0, 1));
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_queue_that_is_missing_is_waited_for() {
    let world = world().await;
    let rabbit = Rabbit::new(world.now).await;
    let proxy = Proxy::start().await;
    let running = world.start_with(
        world
            .subscriber_of(rabbit.source_at(&proxy.address()))
            .await,
    );
    proxy.until_connections(1).await;
    rabbit.declare_answers().await;
    rabbit.declare_deliveries().await;
    rabbit.deliver(1, "ok").await;
    rabbit.until_answers(1).await;
    assert_eq!(world.stop(running).await.consumed, 1);
}

#[tokio::test]
async fn a_queue_deleted_under_its_consumer_is_consumed_when_it_is_back() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let running = start(&world, &rabbit).await;
    rabbit.deliver(1, "ok").await;
    rabbit.until_answers(1).await;
    // At once, so that RabbitMQ does not tell the consumer.
    rabbit.delete_deliveries().await;
    rabbit.declare_deliveries().await;
    rabbit.deliver(2, "ok").await;
    rabbit.until_answers(2).await;
    assert_eq!(world.stop(running).await.consumed, 2);
}

#[tokio::test]
async fn a_consumer_without_a_broker_stops_at_once() {
    let world = world().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("amqp://{}", closed.local_addr().unwrap());
    drop(closed);
    let running = world.start_with(world.subscriber_of(rabbitmq(address)).await);
    assert_eq!(world.stop(running).await, Report::default());
}

#[tokio::test]
async fn an_address_that_is_away_is_passed_over() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let away = closed.local_addr().unwrap();
    drop(closed);
    let addresses = format!("amqp://{away}/%2f,{}", crate::common::amqp());
    let running = world.start_with(world.subscriber_of(rabbit.source_at(&addresses)).await);
    rabbit.deliver(1, "ok").await;
    rabbit.until_answers(1).await;
    assert_eq!(world.stop(running).await.consumed, 1);
}

#[tokio::test]
async fn a_lost_connection_loses_no_answer_and_no_effect_happens_twice() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let proxy = Proxy::start().await;
    let (handler, gate) = world.gated();
    let subscriber = world
        .subscriber_of(rabbit.source_at(&proxy.address()))
        .await;
    let subscriber = subscriber.prefetch(5).max_batch(1).concurrency(5);
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    rabbit.deliver_all(1..=8).await;
    world.until_batches(5).await;
    proxy.cut();
    // What is still in work takes part of the new channel's prefetch, which is all of it.
    proxy.until_connections(2).await;
    rabbit.until_queue(8, 0).await;
    gate.add_permits(100);
    // Each of the five comes again, beside the three that wait.
    rabbit.until_answers(13).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.duplicates), (8, 5));
    assert_eq!((report.unanswered, world.all_effects().await), (0, 8));
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_broker_that_takes_no_answers_does_not_stop_consuming() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let proxy = Proxy::start().await;
    let running = world.start_with(
        world
            .subscriber_of(rabbit.source_at(&proxy.address()))
            .await,
    );
    rabbit.until_queue(0, 1).await;
    // The connection for answers is opened for the first of them.
    proxy.silent(true);
    rabbit.deliver_all(1..=3).await;
    world.until_effects(3).await;
    proxy.until_connections(3).await;
    rabbit.deliver_all(4..=6).await;
    world.until_effects(6).await;
    assert_eq!(rabbit.answers().len(), 0);
    proxy.silent(false);
    rabbit.until_answers(6).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (6, 0));
}

#[tokio::test]
async fn the_prefetch_bounds_what_is_unanswered() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let subscriber = subscriber.prefetch(3).max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    rabbit.deliver_all(1..=10).await;
    for answered in 0..7 {
        // One consumer for the first message, and one for the rest of the prefetch.
        rabbit.until_queue(7 - answered, 2).await;
        gate.add_permits(1);
    }
    gate.add_permits(3);
    rabbit.until_answers(10).await;
    assert_eq!(world.stop(running).await.consumed, 10);
}

#[tokio::test]
async fn a_prefetch_beyond_one_consumers_takes_several() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let running = tokio::spawn(
        subscriber
            .prefetch(2_500)
            .run_batch(handler, world.shutdown.clone()),
    );
    rabbit.deliver_all(1..=2_600).await;
    rabbit.until_queue(100, 3).await;
    gate.add_permits(10_000);
    rabbit.until_answers(2_600).await;
    assert_eq!(world.stop(running).await.consumed, 2_600);
    rabbit.until_queue(0, 0).await;
}

#[tokio::test]
async fn a_shutdown_works_off_what_was_delivered_and_takes_nothing_new() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let running = tokio::spawn(
        subscriber
            .max_batch(1)
            .concurrency(5)
            .run_batch(handler, world.shutdown.clone()),
    );
    rabbit.deliver_all(1..=5).await;
    world.until_batches(5).await;
    world.shutdown.cancel();
    // Until RabbitMQ has heard of it, what comes is still delivered, and worked off.
    let mut sent = 5;
    while rabbit.queue_state().await.0 == 0 {
        sent += 1;
        rabbit.deliver(sent, "ok").await;
    }
    gate.add_permits(1_000);
    let report = world.stop(running).await;
    let consumed = u128::from(report.consumed);
    assert!((5..sent).contains(&consumed), "{consumed} of {sent}");
    assert_eq!(report.unanswered, 0);
    assert_eq!(rabbit.answers().len() as u128, consumed);
    // lapin passes on nothing that comes after its cancel; it goes back with the channel.
    let back = u32::try_from(sent - consumed).unwrap();
    rabbit.until_queue(back, 0).await;
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline_and_the_rest_is_back_in_the_queue() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let subscriber = subscriber
        .max_batch(1)
        .concurrency(2)
        .drain_deadline(Duration::from_millis(100));
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    gate.add_permits(1);
    // The first alone: which of several is answered would be chance, and an ack that is not next
    // in line is held back for its neighbours.
    rabbit.deliver_all(1..=1).await;
    rabbit.until_answers(1).await;
    rabbit.deliver_all(2..=3).await;
    world.until_batches(3).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (1, 2));
    assert_eq!(world.all_effects().await, 1);
    rabbit.until_queue(2, 0).await;
    let back = rabbit.get().await.unwrap();
    assert!(back.redelivered);
}

#[tokio::test]
async fn what_came_back_unanswered_runs_alone() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    rabbit.deliver_all(1..=2).await;
    let (handler, _gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let killed = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    rabbit.until_queue(0, 2).await;
    killed.abort();
    assert!(killed.await.unwrap_err().is_cancelled());
    rabbit.until_queue(2, 0).await;
    world.batches.lock().unwrap().clear();
    rabbit.deliver_all(3..=4).await;

    let running = start(&world, &rabbit).await;
    rabbit.until_answers(4).await;
    assert_eq!(world.stop(running).await.consumed, 4);
    let batches = world.batches.lock().unwrap().clone();
    assert!(batches.contains(&vec![1]), "{batches:?}");
    assert!(batches.contains(&vec![2]), "{batches:?}");
}

/// RabbitMQ drops what came back too often, and counts a return for everything that was held.
#[tokio::test]
async fn while_there_is_something_that_came_back_nothing_is_held_beside_it() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    rabbit.deliver_all(1..=4).await;
    rabbit.hold_and_vanish(4).await;
    rabbit.deliver_all(5..=9).await;

    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    for (batches, left) in (1..=4).zip((5..=8).rev()) {
        world.until_batches(batches).await;
        rabbit.until_queue(left, 1).await;
        gate.add_permits(1);
    }
    // What follows is new, and the rest of the prefetch is asked for.
    world.until_batches(5).await;
    rabbit.until_queue(0, 2).await;
    gate.add_permits(100);
    rabbit.until_answers(9).await;
    assert_eq!(world.stop(running).await.consumed, 9);
}

#[tokio::test]
async fn a_consumer_that_meets_what_came_back_lets_go_of_everything_else_first() {
    let world = world().await;
    let rabbit = Rabbit::declared(world.now).await;
    rabbit.deliver_all(1..=2).await;
    let other = rabbit.hold(2).await;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber_of(rabbit.source()).await;
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    // RabbitMQ counts whoever holds something as a consumer, cancelled or not.
    rabbit.until_queue(0, 2).await;
    rabbit.deliver_all(3..=5).await;
    rabbit.until_queue(0, 3).await;
    // One of two processes goes while the other holds what is new.
    other.vanish().await;
    // Until RabbitMQ has heard that nothing more is asked for, what is new still comes.
    let mut sent = 5;
    while rabbit.queue_state().await.0 == 0 {
        sent += 1;
        rabbit.deliver(sent, "ok").await;
    }
    gate.add_permits(100);
    rabbit.until_answers(sent as usize).await;
    assert_eq!(u128::from(world.stop(running).await.consumed), sent);
    let batches = world.batches.lock().unwrap().clone();
    let at = |id| {
        batches
            .iter()
            .position(|batch| batch.contains(&id))
            .unwrap()
    };
    for came_back in [1, 2] {
        assert_eq!(batches[at(came_back)], [came_back], "{batches:?}");
        assert!((3..=5).all(|id| at(id) < at(came_back)), "{batches:?}");
        assert!(at(sent) > at(came_back), "{batches:?}");
    }
}

#[tokio::test]
async fn what_cannot_work_is_refused_at_the_start() {
    let refused = async |source| Consumer::connect(source).await.err().unwrap();
    let error = refused(rabbitmq("amqps://guest:secret@one")).await;
    assert_eq!(
        error.to_string(),
        "cannot read the source's address `amqps://guest@one`: \
         amqps:// is not supported yet; use amqp://"
    );
    let long = "x".repeat(101);
    for deployment in ["", &long] {
        let error = refused(rabbitmq("amqp://one").deployment(deployment)).await;
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
    let world = world().await;
    for subscription in ["acknowledge", "mark", "", &long] {
        let run = Consumer::connect(rabbitmq("amqp://guest:guest@127.0.0.1:9"))
            .await
            .unwrap()
            .subscription("payment.completed", subscription)
            .inbox(world.pool.clone())
            .run_batch(world.obedient(), CancellationToken::new());
        let ended = tokio::time::timeout(PATIENCE, run).await.unwrap();
        assert!(matches!(ended, Err(Error::Option { .. })), "{subscription}");
    }
    let shown = format!("{:?}", rabbitmq("amqp://guest:secret@one"));
    assert!(!shown.contains("secret"), "{shown}");
}
