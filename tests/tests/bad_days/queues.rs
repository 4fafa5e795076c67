//! One queue of two is gone, full, or does not answer; or the service may no longer write. What
//! is not in a queue is not SENT, an operator sees why, and the other subscription neither waits
//! nor gets anything twice.

use std::time::{Duration, Instant};

use handfast_servers::RabbitMq;
use handfast_tests::{eventually, stays};

use crate::scene::{Id, RESUMES, SOON, STEADY, Scene, TROUBLED};

const USER: &str = "relay";
/// RabbitMQ forgets in this time what an idle channel may. Nothing tells when it has.
const FORGETS: Duration = Duration::from_secs(2);

/// A user of the service's own, who may do everything at first.
fn relay(rabbitmq: &RabbitMq) -> Option<String> {
    let ran = rabbitmq.ctl(&["add_user", USER, "secret"]);
    ran.expect("a new user");
    let ran = rabbitmq.ctl(&["set_permissions", USER, ".*", ".*", ".*"]);
    ran.expect("permissions");
    Some(format!(
        "amqp://{USER}:secret@127.0.0.1:{}/%2f",
        rabbitmq.port()
    ))
}

impl Scene {
    fn permit(&mut self, configure: &str, write: &str) {
        self.ctl(&["set_permissions", USER, configure, write, ".*"]);
    }

    /// For a while, none of these is SENT to a subscription.
    async fn none_is_sent(&self, subscription: &str, ids: &[Id]) {
        let time = Duration::from_secs(2);
        stays("none is SENT", time, async || {
            let deliveries = self.deliveries(subscription, ids).await;
            let sent = deliveries.iter().find(|d| d.state != "PENDING");
            sent.map_or(Ok(()), |delivery| Err(format!("{delivery:?}")))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_deleted_under_load_is_made_again_and_filled_again() {
    let scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = Vec::new();
    for round in 0..30 {
        all.extend(scene.publish(10).await);
        if round % 10 == 5 {
            scene.world.delete_queue(TROUBLED).await;
        }
    }
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    steady.came_once(&all).await;
    scene.not_delayed(STEADY, &all).await;
    troubled.kept_once(&all).await;
    // What was in the queue was lost, and others passed it by: that counts as one attempt.
    let lost = scene.deliveries(TROUBLED, &all).await;
    assert!(lost.iter().all(|d| d.attempts <= 3), "{lost:?}");
    let again = lost.iter().filter(|d| d.generation > 1).count();
    assert!(again > 0, "nothing was lost or returned");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_queue_is_not_sent_until_the_queue_may_be_made_again() {
    let mut scene = Scene::start_as(relay).await;
    let steady = scene.sink(STEADY).await;
    scene.permit("^$", ".*");
    let queue = scene.queue(TROUBLED);
    scene.ctl(&["delete_queue", &queue]);
    let all = scene.publish(30).await;
    scene.until_consumed(STEADY, &all, RESUMES).await;
    let reason = scene.until_trouble(TROUBLED).await;
    scene.none_is_sent(TROUBLED, &all).await;
    eprintln!("an operator reads: {reason}");
    assert_eq!(scene.trouble(STEADY).await, "");

    scene.permit(".*", ".*");
    let repaired = Instant::now();
    let troubled = scene.sink(TROUBLED).await;
    scene.until_consumed(TROUBLED, &all, SOON).await;
    eprintln!("sent {:?} after the repair", repaired.elapsed());
    assert_eq!(scene.trouble(TROUBLED).await, "");
    steady.came_once(&all).await;
    scene.not_delayed(STEADY, &all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_be_written_is_not_sent_until_it_may_again() {
    let mut scene = Scene::start_as(relay).await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(10).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    scene.permit(".*", "^$");
    // A channel remembers what it may until it has been idle for a second; what goes through until
    // then is sent.
    for subscription in [STEADY, TROUBLED] {
        let reason = loop {
            tokio::time::sleep(FORGETS).await;
            let probe = scene.publish(1).await;
            let denied = scene.until_denied(subscription, &probe).await;
            all.extend(probe);
            if let Some(reason) = denied {
                break reason;
            }
        };
        eprintln!("an operator reads: {reason}");
    }
    let during = scene.publish(30).await;
    for subscription in [STEADY, TROUBLED] {
        scene.none_is_sent(subscription, &during).await;
        assert!(!scene.until_trouble(subscription).await.is_empty());
    }

    scene.permit(".*", ".*");
    all.extend(during);
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
        assert_eq!(scene.trouble(subscription).await, "");
    }
    steady.kept_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

impl Scene {
    /// None if this one was consumed all the same; else why it is not sent.
    async fn until_denied(&self, subscription: &str, probe: &[Id]) -> Option<String> {
        eventually("a probe is consumed or denied", SOON, async || {
            let delivery = self.deliveries(subscription, probe).await.remove(0);
            if delivery.state == "CONSUMED" {
                return Ok(None);
            }
            let reason = self.trouble(subscription).await;
            (!reason.is_empty())
                .then_some(Some(reason))
                .ok_or_else(|| format!("{delivery:?}"))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_gives_the_other_subscription_one_copy_each() {
    let mut scene = Scene::start().await;
    let steady = scene.sink(STEADY).await;
    let pattern = format!("^{}$", scene.queue(TROUBLED).replace('.', "\\."));
    let full = r#"{"max-length": 1, "overflow": "reject-publish"}"#;
    scene.ctl(&["set_policy", "full", &pattern, full, "--apply-to", "queues"]);
    let mut all = Vec::new();
    for _ in 0..10 {
        all.extend(scene.publish(20).await);
    }
    scene.until_consumed(STEADY, &all, RESUMES).await;
    let reason = scene.until_trouble(TROUBLED).await;
    assert!(reason.contains("full"), "{reason}");
    let waiting = scene.deliveries(TROUBLED, &all).await;
    let refused = waiting.iter().filter(|d| d.state == "PENDING").count();
    assert!(refused > 0, "the queue took everything");
    assert!(waiting.iter().all(|d| d.state != "CONSUMED"));
    assert_eq!(scene.trouble(STEADY).await, "");

    scene.ctl(&["clear_policy", "full"]);
    let troubled = scene.sink(TROUBLED).await;
    scene.until_consumed(TROUBLED, &all, SOON).await;
    steady.came_once(&all).await;
    scene.not_delayed(STEADY, &all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_does_not_answer_delays_nobody_else() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    let process = format!("whereis('%2F_{}')", scene.queue(TROUBLED));
    let suspend = format!("sys:suspend({process}).");
    assert_eq!(scene.rabbitmq().eval(&suspend).unwrap(), "ok");
    let mut silent = Vec::new();
    for _ in 0..10 {
        let some = scene.publish(20).await;
        scene.until_consumed(STEADY, &some, RESUMES).await;
        silent.extend(some);
    }
    scene.until_trouble(TROUBLED).await;
    silent.extend(scene.publish(20).await);
    scene.until_consumed(STEADY, &silent, RESUMES).await;
    scene.not_delayed(STEADY, &silent).await;
    scene.none_is_sent(TROUBLED, &silent).await;
    all.extend(silent);
    assert_eq!(scene.trouble(STEADY).await, "");

    let resume = format!("sys:resume({process}).");
    assert_eq!(scene.rabbitmq().eval(&resume).unwrap(), "ok");
    scene.until_consumed(TROUBLED, &all, SOON).await;
    steady.came_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_whose_queue_does_not_answer_are_shown_and_taken_later() {
    let mut scene = Scene::start().await;
    let (steady, troubled) = (scene.sink(STEADY).await, scene.sink(TROUBLED).await);
    let mut all = scene.publish(20).await;
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    assert_eq!(scene.answers_trouble().await, "");
    let process = format!("whereis('%2F_{}')", scene.queue("acknowledge"));
    let suspend = format!("sys:suspend({process}).");
    assert_eq!(scene.rabbitmq().eval(&suspend).unwrap(), "ok");
    let silent = scene.publish(20).await;
    let shown = eventually("the reason is shown", SOON, async || {
        let trouble = scene.answers_trouble().await;
        let named = trouble.contains("acknowledge");
        named.then_some(trouble.clone()).ok_or(trouble)
    })
    .await;
    eprintln!("an operator reads: {shown}");

    let resume = format!("sys:resume({process}).");
    assert_eq!(scene.rabbitmq().eval(&resume).unwrap(), "ok");
    all.extend(silent);
    for subscription in [STEADY, TROUBLED] {
        scene.until_consumed(subscription, &all, SOON).await;
    }
    eventually("all is well", SOON, async || {
        let trouble = scene.answers_trouble().await;
        trouble.is_empty().then_some(()).ok_or(trouble)
    })
    .await;
    steady.kept_once(&all).await;
    troubled.kept_once(&all).await;
    scene.nothing_counted().await;
}
