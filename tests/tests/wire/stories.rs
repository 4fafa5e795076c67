//! What may happen between a shop, its status server and accounting.

use handfast_proto::v1::{DecidedBy, DeliveryState, MessageState};
use handfast_tests::config::STEP_MS;
use handfast_tests::{Party, eventually};
use uuid::Uuid;

use crate::scene::{ACCOUNTING, ADA, PATIENCE, Scene};

fn consumed(delivery: &handfast_proto::v1::DeliveryRow) -> bool {
    delivery.state() == DeliveryState::Consumed
}

#[tokio::test]
async fn what_committed_is_booked_and_what_rolled_back_is_never_heard_of() {
    let mut scene = Scene::new().await;
    // Whatever comes first waits for the rest.
    scene.start_accounting("");
    scene.start_status();
    scene.world.start(Party::Service).await;

    for said in scene.pays(ADA, &["a1", "a2", "a3"], &[]).await.values() {
        assert_eq!(said, "PAID");
    }
    let again = scene.pays(ADA, &["a1"], &[]).await;
    assert_eq!(again["a1"], "PAID BEFORE");
    let given_up = scene
        .pays(ADA, &["r1", "r2"], &["--end", "roll-back"])
        .await;
    assert_eq!(given_up["r1"], "ROLLED BACK");
    // Its key is free again.
    scene.pays_one(ADA, "r1", &["--amount", "7"]).await;

    scene.everything_is_booked().await;
    let confirmed = scene.status(scene.message_of("a1").await).await;
    assert_eq!(confirmed.decided_by(), DecidedBy::Producer);
    let rolled_back: Vec<Uuid> =
        sqlx::query_scalar("SELECT message_id FROM handfast_fence WHERE verdict = 'ROLLED_BACK'")
            .fetch_all(&scene.shop.pool)
            .await
            .unwrap();
    assert_eq!(rolled_back.len(), 2);
    for message in rolled_back {
        assert_eq!(scene.status(message).await.state(), MessageState::Cancelled);
    }
    scene.stop(ACCOUNTING).await;
    scene.stop("status").await;
}

#[tokio::test]
async fn a_confirm_that_never_comes_is_replaced_by_the_check() {
    let mut scene = Scene::new().await;
    scene.world.start(Party::Service).await;
    scene.start_accounting("");
    let message = scene.pays_one(ADA, "f1", &["--end", "forget"]).await;
    assert_eq!(scene.status(message).await.state(), MessageState::Prepared);
    // The shop is gone; what it paid is found out from its database.
    scene.start_status();
    scene.everything_is_booked().await;
    assert_eq!(scene.status(message).await.decided_by(), DecidedBy::Check);
}

#[tokio::test]
async fn an_effect_is_applied_once_though_its_consumer_is_killed_before_its_ack() {
    let mut scene = Scene::new().await;
    scene.world.start(Party::Service).await;
    scene.start_status();
    scene.start_accounting("committed");
    scene
        .pays(ADA, &["k1", "k2", "k3"], &["--amount", "10"])
        .await;
    scene.was_killed(ACCOUNTING).await;
    assert_eq!(scene.booked().await.len(), 1, "it had committed the first");
    // It commits the second, or meets the first again, and dies with its answer confirmed.
    scene.start_accounting("answered");
    scene.was_killed(ACCOUNTING).await;
    scene.start_accounting("");
    scene.everything_is_booked().await;
    let repeats = "SELECT count(*) FROM handfast_inbox WHERE seen > 1";
    eventually("a repeat was met", PATIENCE, async || {
        let repeats = scene.counted(repeats).await;
        (repeats > 0)
            .then_some(())
            .ok_or_else(|| "no repeat".to_owned())
    })
    .await;
    for order in ["k1", "k2", "k3"] {
        let message = scene.message_of(order).await;
        let delivery = scene.delivery(message, "CONSUMED", consumed).await;
        assert_eq!(delivery.attempts, 0, "{delivery:?}");
    }
    let balance = "SELECT balance FROM account WHERE name = 'ada'";
    assert_eq!(scene.counted(balance).await, 30);
}

#[tokio::test]
async fn a_failed_delivery_comes_again_by_the_schedule() {
    let mut scene = Scene::running().await;
    let message = scene.pays_one("eve", "e1", &[]).await;
    scene.happened(message, "failed").await;
    scene
        .change("INSERT INTO account (name) VALUES ('eve')")
        .await;
    let delivery = scene.delivery(message, "CONSUMED", consumed).await;
    assert_eq!(
        (delivery.attempts, delivery.generation),
        (1, 2),
        "{delivery:?}"
    );
    let waited_us = delivery.sent_at() - delivery.first_sent_at();
    let least_us = STEP_MS.cast_signed() * 1000 * 9 / 10;
    assert!(waited_us >= least_us, "{waited_us} µs");
    scene.everything_is_booked().await;
}

#[tokio::test]
async fn later_does_not_count() {
    let mut scene = Scene::running().await;
    scene
        .change("INSERT INTO account (name, closed) VALUES ('bob', true)")
        .await;
    let message = scene.pays_one("bob", "b1", &[]).await;
    scene.happened(message, "later").await;
    scene.change("UPDATE account SET closed = false").await;
    let delivery = scene.delivery(message, "CONSUMED", consumed).await;
    assert_eq!(delivery.attempts, 0, "{delivery:?}");
    assert!(delivery.generation > 1, "{delivery:?}");
    scene.everything_is_booked().await;
}

#[tokio::test]
async fn a_rejected_delivery_is_dead() {
    let mut scene = Scene::running().await;
    let message = scene.pays_one(ADA, "x1", &["--payload", "rubbish"]).await;
    let dead = scene
        .delivery(message, "DEAD", |delivery| {
            delivery.state() == DeliveryState::Dead
        })
        .await;
    assert!(dead.last_error.contains("this is no payment"), "{dead:?}");
    assert_eq!(
        scene.counted("SELECT count(*) FROM handfast_inbox").await,
        0
    );
    assert_eq!(scene.booked().await, []);
}
