use std::sync::atomic::Ordering;

use super::*;
use crate::message::{AnswerKind, DeliveryPolicy, DeliveryState};
use crate::store::{DeliveryClaim, Lane, Sent};
use crate::world::{Signals, World, id};

struct Scene {
    world: World,
    broker: Arc<Signals>,
    answered: Arc<Answered>,
    recovery: Arc<Recovery>,
}

async fn scene() -> Scene {
    in_world(World::new().await)
}

fn in_world(world: World) -> Scene {
    let broker = Arc::new(Signals::default());
    let answered = Arc::new(Answered::default());
    let recovery = Recovery::new(
        world.store.clone(),
        broker.clone(),
        answered.clone(),
        world.topology.clone(),
        world.clock.clone(),
        Settings::default(),
    );
    Scene {
        world,
        broker,
        answered,
        recovery,
    }
}

impl Scene {
    /// Sends accounting all that is due, and marks it SENT.
    async fn send(&self) -> Vec<DeliveryClaim> {
        let lane = Lane::Normal {
            limit: 500,
            max_bytes: usize::MAX,
        };
        let store = &self.world.store;
        let lease = Duration::from_secs(30);
        let claimed = store.claim_deliveries("accounting", lane, lease).await;
        let claims = claimed.unwrap().deliveries;
        let sent = claims.iter().map(|claim| Sent {
            id: claim.id,
            token: claim.token,
        });
        let resend_after = Settings::default().resend_after;
        let marked = store.mark_sent("accounting", sent.collect(), resend_after);
        assert_eq!(marked.await.unwrap(), claims.len());
        claims
    }

    /// Accounting answers CONSUMED.
    async fn consume(&self, claim: &DeliveryClaim) {
        let waiting = self.answered.arrive("accounting");
        self.world.answer(claim, AnswerKind::Consumed).await;
        waiting.recorded(Some(claim.sent_at), self.world.store.now());
    }

    async fn round(&self) -> Report {
        self.recovery.run_once().await.unwrap()
    }

    fn pass(&self, seconds: u64) {
        self.world.clock.advance(Duration::from_secs(seconds));
    }
}

#[tokio::test]
async fn silence_waits_and_costs_no_attempt() {
    let scene = scene().await;
    scene.world.publish([1]).await;
    scene.send().await;
    scene.pass(60);
    let report = scene.round().await;
    assert_eq!(
        (report.overdue, report.passed_by, report.settled),
        (1, 0, 1)
    );
    let delivery = scene.world.delivery(1).await;
    assert_eq!(
        (delivery.state, delivery.attempts),
        (DeliveryState::Sent, 0)
    );
    assert_eq!(scene.round().await.overdue, 0);
}

#[tokio::test]
async fn what_was_passed_by_is_sent_again_and_counts_as_an_attempt() {
    let scene = scene().await;
    scene.world.publish([1]).await;
    scene.send().await;
    scene.pass(31);
    scene.world.publish([2]).await;
    let second = scene.send().await;
    scene.consume(&second[0]).await;
    scene.pass(15);
    assert_eq!(scene.round().await.passed_by, 1);
    let delivery = scene.world.delivery(1).await;
    assert_eq!(
        (delivery.state, delivery.attempts),
        (DeliveryState::Pending, 1)
    );
    assert_eq!(scene.broker.due.lock().unwrap().len(), 1);
    assert_eq!(scene.send().await[0].id, id(1));
}

#[tokio::test]
async fn a_backlog_is_not_sent_again() {
    let scene = scene().await;
    scene.world.publish(1..=100).await;
    let claims = scene.send().await;
    scene.pass(120);
    for claim in &claims[..10] {
        scene.consume(claim).await;
    }
    let report = scene.round().await;
    assert_eq!((report.overdue, report.passed_by), (90, 0));
}

#[tokio::test]
async fn what_no_queue_holds_is_sent_again() {
    let scene = scene().await;
    scene.world.publish([1, 2]).await;
    scene.send().await;
    scene.broker.gone.lock().unwrap().insert(id(2));
    scene.pass(60);
    assert_eq!(scene.round().await.passed_by, 1);
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Sent);
    assert_eq!(scene.world.delivery(2).await.state, DeliveryState::Pending);
}

#[tokio::test]
async fn nothing_is_sent_again_right_after_the_start_or_an_outage() {
    let world = World::new().await;
    let scene = in_world(world);
    scene.world.publish([1]).await;
    scene.send().await;
    scene.broker.gone.lock().unwrap().insert(id(1));
    scene.pass(60);
    let restarted = in_world(scene.world);
    restarted.broker.gone.lock().unwrap().insert(id(1));
    assert_eq!(restarted.round().await.overdue, 0);

    // Twice: also an outage that comes while nothing is sent again anyway.
    for waited in [20, 20] {
        restarted.pass(waited);
        restarted.world.store.fail(&["overdue"]);
        assert!(restarted.recovery.run_once().await.is_err());
        restarted.world.store.heal();
        restarted.pass(15);
        assert_eq!(restarted.round().await.overdue, 0);
    }
    restarted.pass(16);
    assert_eq!(restarted.round().await.passed_by, 1);
}

#[tokio::test]
async fn answers_that_wait_come_first_but_not_for_ever() {
    let scene = scene().await;
    scene.world.publish([1]).await;
    scene.send().await;
    scene.broker.gone.lock().unwrap().insert(id(1));
    scene.pass(60);
    let stuck = scene.answered.arrive("accounting");
    assert_eq!(scene.round().await.overdue, 0);
    // Under load another answer waits before the first one is written.
    let next = scene.answered.arrive("accounting");
    drop(stuck);
    assert_eq!(scene.round().await.passed_by, 1);
    drop(next);
}

#[tokio::test]
async fn two_passes_at_once_count_one_attempt() {
    let scene = scene().await;
    scene.world.publish(1..=20).await;
    scene.send().await;
    let gone = (1..=20).map(id);
    scene.broker.gone.lock().unwrap().extend(gone);
    scene.pass(60);
    let (one, two) = tokio::join!(scene.recovery.run_once(), scene.recovery.run_once());
    assert_eq!(one.unwrap().settled + two.unwrap().settled, 20);
    for n in 1..=20 {
        assert_eq!(scene.world.delivery(n).await.attempts, 1);
    }
}

#[tokio::test]
async fn an_error_over_age_keeps_nothing_else_from_its_turn() {
    let scene = scene().await;
    scene.world.publish([1]).await;
    scene.send().await;
    scene.broker.gone.lock().unwrap().insert(id(1));
    scene.pass(60);
    scene.world.store.fail(&["expire"]);
    assert!(scene.recovery.run_once().await.is_err());
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Pending);
}

#[tokio::test]
async fn what_is_older_than_max_age_is_dead() {
    let world = World::with_policy(DeliveryPolicy {
        max_age: Some(Duration::from_secs(100)),
        ..DeliveryPolicy::default()
    })
    .await;
    let scene = in_world(world);
    scene.world.publish(1..=500).await;
    scene.world.publish(501..=700).await;
    scene.pass(99);
    assert_eq!(scene.round().await.expired, 0);
    scene.pass(2);
    // Both subscriptions, in slices.
    assert_eq!(scene.round().await.expired, 1_400);
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Dead);
}

/// A turn that is asked for again after every step.
fn turn(scene: &Scene) -> Turn {
    let replica = uuid::Uuid::from_u128(1);
    Turn::new(
        scene.world.store.clone(),
        store::Shared::Recovery,
        replica,
        Duration::ZERO,
    )
}

#[tokio::test]
async fn who_has_not_the_turn_looks_at_nothing() {
    let scene = scene().await;
    let store = &scene.world.store;
    store.turn_is_anothers.store(true, Ordering::SeqCst);
    let next = scene.recovery.take_turn(&turn(&scene)).await.unwrap();
    assert_eq!(next, Next::NotBefore(Duration::ZERO));
    assert_eq!((store.calls("overdue"), store.calls("expire")), (0, 0));
    store.turn_is_anothers.store(false, Ordering::SeqCst);
    let next = scene.recovery.take_turn(&turn(&scene)).await.unwrap();
    assert_eq!(next, Next::Signal);
    assert_eq!((store.calls("overdue"), store.calls("expire")), (2, 2));
}

#[tokio::test]
async fn who_loses_the_turn_leaves_the_rest() {
    let scene = scene().await;
    let store = &scene.world.store;
    store.turn_is_lost.store(true, Ordering::SeqCst);
    let next = scene.recovery.take_turn(&turn(&scene)).await.unwrap();
    assert_eq!(next, Next::Signal);
    assert_eq!(store.calls("overdue"), 1, "of two subscriptions");
}

#[tokio::test]
async fn an_outage_that_only_the_turn_has_met_begins_grace_again() {
    let scene = scene().await;
    scene.world.publish([1]).await;
    scene.send().await;
    scene.broker.gone.lock().unwrap().insert(id(1));
    scene.pass(60);
    let turn = turn(&scene);
    scene.world.store.fail(&["take_turn"]);
    scene.recovery.take_turn(&turn).await.unwrap_err();
    scene.world.store.heal();
    scene.recovery.take_turn(&turn).await.unwrap();
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Sent);
    scene.pass(31);
    scene.recovery.take_turn(&turn).await.unwrap();
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Pending);
}
