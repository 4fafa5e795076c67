//! RabbitMQ has no memory or no disk left: it reads nothing more from who publishes. Nothing is
//! claimed meanwhile, and nothing is sent twice.

use std::time::Instant;

use handfast_proto::v1::BrokerState;

use crate::scene::{RESUMES, STEADY, Scene, TROUBLED};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_alarm_is_shown_and_over_once_it_is_over() {
    let alarm = ["set_vm_memory_high_watermark", "0.0000001"];
    let end = ["set_vm_memory_high_watermark", "0.4"];
    is_shown_and_over(&alarm, &end, "memory").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_alarm_is_shown_and_over_once_it_is_over() {
    let alarm = ["set_disk_free_limit", "1000000GB"];
    let end = ["set_disk_free_limit", "50MB"];
    is_shown_and_over(&alarm, &end, "disk").await;
}

async fn is_shown_and_over(alarm: &[&str], end: &[&str], reason: &str) {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, RESUMES).await;
    }

    scene.ctl(alarm);
    // RabbitMQ blocks who publishes when it publishes.
    all.extend(scene.publish(1).await);
    let broker = scene.until_broker(BrokerState::Blocked).await;
    assert!(broker.reason.contains(reason), "{broker:?}");
    let mut during = scene.publish(30).await;
    during.push(scene.prepare_and_confirm().await);
    scene.untouched(&during).await;
    let broker = scene.until_broker(BrokerState::Blocked).await;
    assert!(broker.reason.contains(reason), "{broker:?}");

    scene.ctl(end);
    let over = Instant::now();
    all.extend(during);
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, RESUMES).await;
    }
    assert!(over.elapsed() < RESUMES, "took {:?}", over.elapsed());
    scene.until_broker(BrokerState::Up).await;
    steady.came_once(&all).await;
    troubled.came_once(&all).await;
    scene.nothing_counted().await;
}
