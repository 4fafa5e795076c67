//! RabbitMQ is down or frozen: what can be kept is kept, an operator sees why nothing goes out,
//! and it goes on by itself.

use std::time::{Duration, Instant};

use handfast_proto::v1::BrokerState;

use crate::scene::{RESUMES, SOON, STEADY, Scene, TROUBLED};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_rabbitmq_is_down_nothing_is_claimed_and_afterwards_everything_arrives() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }

    scene.rabbitmq().stop().unwrap();
    let broker = scene.until_broker(BrokerState::Down).await;
    assert!(!broker.reason.is_empty(), "an operator sees why");
    let mut during = scene.publish(50).await;
    during.push(scene.prepare_and_confirm().await);
    scene.untouched(&during).await;

    scene.rabbitmq().start_again().unwrap();
    let back = Instant::now();
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &during, RESUMES).await;
    }
    assert!(back.elapsed() < RESUMES, "took {:?}", back.elapsed());
    scene.until_broker(BrokerState::Up).await;
    all.extend(during);
    steady.came_once(&all).await;
    troubled.came_once(&all).await;
    scene.nothing_counted().await;
}

/// RabbitMQ 3.10 forgets a quorum queue that it made less than a moment before it is killed: the
/// queue is there again without its log and without a leader. A stop in good order writes down
/// that there is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rabbitmq_that_was_killed_goes_on_where_it_stopped() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    scene.rabbitmq().stop().unwrap();
    scene.rabbitmq().start_again().unwrap();
    all.extend(scene.publish(20).await);
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }

    scene.rabbitmq().kill().unwrap();
    scene.until_broker(BrokerState::Down).await;
    let mut during = scene.publish(50).await;
    during.push(scene.prepare_and_confirm().await);
    scene.untouched(&during).await;
    scene.rabbitmq().start_again().unwrap();
    let back = Instant::now();
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &during, RESUMES).await;
    }
    assert!(back.elapsed() < RESUMES, "took {:?}", back.elapsed());
    all.extend(during);
    steady.kept_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_rabbitmq_holds_up_no_call_and_goes_on_where_it_stopped() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }

    scene.rabbitmq().freeze().unwrap();
    let frozen = Instant::now();
    all.extend(scene.publish(30).await);
    all.push(scene.prepare_and_confirm().await);
    assert!(
        frozen.elapsed() < Duration::from_secs(2),
        "calls took {:?}",
        frozen.elapsed()
    );
    for subscription in [STEADY, TROUBLED] {
        scene.until_trouble(subscription).await;
    }
    all.extend(scene.publish(10).await);

    scene.rabbitmq().thaw().unwrap();
    let back = Instant::now();
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, RESUMES).await;
    }
    assert!(back.elapsed() < RESUMES, "took {:?}", back.elapsed());
    steady.kept_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_an_operator_closes_come_back() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = Vec::new();
    for round in ["once", "twice"] {
        for _ in 0..10 {
            all.extend(scene.publish(20).await);
        }
        scene.ctl(&["close_all_connections", round]);
        let closed = Instant::now();
        all.extend(scene.publish(20).await);
        for subscription in [STEADY, TROUBLED] {
            scene.until_consumed(subscription, &all, RESUMES).await;
        }
        assert!(closed.elapsed() < RESUMES, "took {:?}", closed.elapsed());
    }
    steady.kept_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}
