use super::*;
use crate::message::{AnswerKind, DeliveryState};
use crate::store::DeliveryView;
use crate::world::{DEADLINE, TOPIC, World, id};

/// No test waits for the poll: what is not signalled is not found.
const NEVER: Duration = Duration::from_secs(3_600);

struct Scene {
    world: World,
    broker: Arc<Embedded>,
}

async fn scene() -> Scene {
    with(|_| {}).await
}

async fn with(change: impl FnOnce(&mut Settings)) -> Scene {
    let world = World::new().await;
    let mut settings = Settings {
        poll: NEVER,
        // SENT is written by hand.
        sent_flush: NEVER,
        lease: 4 * NEVER,
        ..Settings::default()
    };
    change(&mut settings);
    let broker = Embedded::new(
        world.store.clone(),
        world.topology.clone(),
        world.clock.clone(),
        settings,
    );
    Scene { world, broker }
}

impl Scene {
    fn open(&self) -> Session {
        self.broker
            .open("accounting".to_owned(), "test".to_owned())
            .unwrap()
    }

    async fn publish(&self, numbers: impl IntoIterator<Item = u128>) {
        self.world.publish(numbers).await;
        self.broker.due(&[TOPIC.to_owned()].into());
    }

    async fn answer(&self, sending: &Sending, kind: AnswerKind) {
        self.world.answer(&sending.claim, kind).await;
        self.broker.answered("accounting", &[sending.claim.id]);
    }

    async fn consume(&self, batch: &[Sending]) {
        for sending in batch {
            self.answer(sending, AnswerKind::Consumed).await;
        }
    }

    /// Waits until message `n` came back from a stream.
    async fn back(&self, n: u128) -> DeliveryView {
        let back = |delivery: &DeliveryView| {
            delivery.state == DeliveryState::Pending
                && delivery.due_at <= Some(self.world.store.now())
        };
        self.world.until(n, back).await
    }

    async fn until_streams(&self, open: usize) {
        self.broker
            .wait_until(DEADLINE, |state| state.streams == open)
            .await;
        assert_eq!(self.broker.lock().streams, open);
    }
}

async fn next(session: &mut Session) -> Option<Vec<Sending>> {
    tokio::time::timeout(DEADLINE, session.next())
        .await
        .unwrap()
}

async fn batch(session: &mut Session) -> Vec<Sending> {
    next(session).await.unwrap()
}

fn numbers(batch: &[Sending]) -> Vec<MessageId> {
    batch.iter().map(|sending| sending.claim.id).collect()
}

#[tokio::test]
async fn nothing_is_claimed_without_credit_and_no_more_than_the_credit() {
    let scene = scene().await;
    scene.publish(1..=5).await;
    let mut session = scene.open();
    tokio::task::yield_now().await;
    assert_eq!(scene.world.store.calls("claim_deliveries"), 0);
    session.credit(3);
    assert_eq!(batch(&mut session).await.len(), 3);
    session.credit(10);
    assert_eq!(batch(&mut session).await.len(), 2);
}

#[tokio::test]
async fn a_signal_wakes_a_stream_that_waits() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(10);
    scene.world.store.until_called("claim_deliveries", 1).await;
    scene.publish([1]).await;
    assert_eq!(numbers(&batch(&mut session).await), [id(1)]);
}

#[tokio::test]
async fn two_consumers_of_a_subscription_share_its_deliveries() {
    let scene = scene().await;
    let mut one = scene.open();
    let mut two = scene.open();
    assert_eq!(scene.broker.consumers("accounting"), Some(2));
    one.credit(3);
    two.credit(3);
    scene.publish(1..=6).await;
    let mut all = numbers(&batch(&mut one).await);
    all.extend(numbers(&batch(&mut two).await));
    all.sort();
    assert_eq!(all, (1..=6).map(id).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_batch_that_the_consumer_does_not_take_holds_up_further_claims() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(1);
    scene.publish(1..=3).await;
    scene.world.store.until_called("claim_deliveries", 1).await;
    session.credit(2);
    assert_eq!(batch(&mut session).await.len(), 1);
    assert_eq!(batch(&mut session).await.len(), 2);
}

#[tokio::test]
async fn credit_ends_at_ten_thousand() {
    let scene = scene().await;
    let session = scene.open();
    session.credit(u32::MAX);
    session.credit(u32::MAX);
    let mut state = scene.broker.lock();
    let queue = state.queue("accounting").unwrap();
    let view = queue.view(1, Duration::ZERO, NEVER);
    assert_eq!(view.credit, 10_000);
}

#[tokio::test]
async fn there_are_no_more_streams_than_allowed() {
    let scene = with(|settings| settings.max_streams = 1).await;
    let session = scene.open();
    let refused = scene.broker.open("points".to_owned(), String::new());
    assert_eq!(refused.unwrap_err(), TooManyStreams { most: 1 });
    drop(session);
    scene.until_streams(0).await;
    assert!(
        scene
            .broker
            .open("points".to_owned(), String::new())
            .is_ok()
    );
}

#[tokio::test]
async fn what_a_vanished_client_held_is_due_at_once_and_goes_alone() {
    let scene = scene().await;
    let mut gone = scene.open();
    gone.credit(2);
    scene.publish([1, 2]).await;
    let first = batch(&mut gone).await;
    assert!(!first[0].alone);
    drop(gone);
    let returned = scene.back(1).await;
    assert_eq!(returned.attempts, 0);

    let mut next = scene.open();
    next.credit(10);
    let alone = batch(&mut next).await;
    assert_eq!(alone.len(), 1);
    assert!(alone[0].alone);
    assert_eq!(alone[0].claim.generation, 2);
    scene.consume(&alone).await;
    let alone = batch(&mut next).await;
    assert_eq!(alone.len(), 1);
    assert!(alone[0].alone);
}

#[tokio::test]
async fn other_streams_are_woken_by_what_comes_back() {
    let scene = scene().await;
    let mut gone = scene.open();
    gone.credit(1);
    scene.publish([1]).await;
    batch(&mut gone).await;
    let mut stays = scene.open();
    stays.credit(1);
    scene.world.store.until_called("claim_deliveries", 2).await;
    drop(gone);
    assert_eq!(numbers(&batch(&mut stays).await), [id(1)]);
}

#[tokio::test]
async fn what_waits_in_the_channel_counts_as_held() {
    let scene = scene().await;
    let session = scene.open();
    session.credit(1);
    scene.publish([1]).await;
    scene
        .world
        .until(1, |delivery| delivery.generation == 1)
        .await;
    session.lost();
    scene.back(1).await;
    drop(session);
    scene.until_streams(0).await;
}

#[tokio::test]
async fn alone_ones_and_the_others_take_turns() {
    let scene = scene().await;
    let mut gone = scene.open();
    gone.credit(2);
    scene.publish([1, 2]).await;
    batch(&mut gone).await;
    drop(gone);
    scene.until_streams(0).await;

    scene.publish([3]).await;
    let mut session = scene.open();
    session.credit(10);
    // The first look finds what never came back.
    let normal = batch(&mut session).await;
    assert_eq!(numbers(&normal), [id(3)]);
    scene.publish([4]).await;
    scene.consume(&normal).await;
    let alone = batch(&mut session).await;
    assert!(alone[0].alone);
    scene.consume(&alone).await;
    assert_eq!(numbers(&batch(&mut session).await), [id(4)]);
}

#[tokio::test]
async fn nothing_goes_beside_the_one_that_is_alone() {
    let scene = scene().await;
    let mut gone = scene.open();
    gone.credit(1);
    scene.publish([1]).await;
    batch(&mut gone).await;
    drop(gone);
    scene.until_streams(0).await;

    let mut session = scene.open();
    session.credit(10);
    let alone = batch(&mut session).await;
    assert!(alone[0].alone);
    scene.publish([2]).await;
    tokio::task::yield_now().await;
    assert!(session.sendings_is_empty());
    scene.consume(&alone).await;
    assert_eq!(numbers(&batch(&mut session).await), [id(2)]);
}

#[tokio::test]
async fn a_half_closed_stream_ends_when_its_credit_is_used_up_and_answered() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(2);
    session.half_close();
    session.credit(5);
    scene.publish(1..=3).await;
    let last = batch(&mut session).await;
    assert_eq!(last.len(), 2);
    assert_eq!(scene.broker.consumers("accounting"), Some(1));
    scene.consume(&last).await;
    assert_eq!(next(&mut session).await, None);
    scene.until_streams(0).await;
    assert_eq!(scene.world.store.calls("return_deliveries"), 0);
}

#[tokio::test]
async fn the_way_back_outlasts_an_outage_of_the_store() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(1);
    scene.publish([1]).await;
    batch(&mut session).await;
    scene.world.store.fail(&["return_deliveries"]);
    drop(session);
    scene.world.store.until_called("return_deliveries", 2).await;
    scene.world.store.heal();
    scene.back(1).await;
    scene.until_streams(0).await;
}

#[tokio::test]
async fn what_is_on_its_way_back_is_not_gone() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(1);
    scene.publish([1]).await;
    let held = batch(&mut session).await;
    let overdue = |generation| Overdue {
        id: id(1),
        generation,
        sent_at: held[0].claim.sent_at,
        due_at: held[0].claim.sent_at,
    };
    let rows = [overdue(1), overdue(2)];
    assert_eq!(
        scene.broker.is_gone("accounting", &rows).await,
        [false, true]
    );
    scene.world.store.fail(&["return_deliveries"]);
    drop(session);
    scene.world.store.until_called("return_deliveries", 1).await;
    assert_eq!(
        scene.broker.is_gone("accounting", &rows).await,
        [false, true]
    );
    assert_eq!(scene.broker.consumers("accounting"), Some(0));
    scene.world.store.heal();
    scene.until_streams(0).await;
    assert_eq!(
        scene.broker.is_gone("accounting", &rows).await,
        [true, true]
    );
}

#[tokio::test]
async fn sent_is_written_late_and_only_for_what_is_not_answered() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(2);
    scene.publish([1, 2]).await;
    let held = batch(&mut session).await;
    scene.consume(&held[..1]).await;
    assert_eq!(scene.broker.flush().await.unwrap(), 1);
    assert_eq!(scene.world.delivery(2).await.state, DeliveryState::Sent);
    assert_eq!(scene.broker.flush().await.unwrap(), 0);
    assert_eq!(scene.world.store.calls("mark_sent"), 1);
}

#[tokio::test]
async fn a_lease_is_renewed_while_sent_cannot_be_written() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(1);
    scene.publish([1]).await;
    batch(&mut session).await;
    scene.world.store.fail(&["mark_sent"]);
    assert!(scene.broker.flush().await.is_err());
    assert_eq!(scene.world.store.calls("renew"), 0);
    scene.world.clock.advance(2 * NEVER);
    assert!(scene.broker.flush().await.is_err());
    assert_eq!(scene.world.store.calls("renew"), 1);
    // The lease would be over by now.
    scene.world.clock.advance(3 * NEVER);
    scene.world.store.heal();
    scene.broker.flush().await.unwrap();
    let delivery = scene.world.delivery(1).await;
    assert_eq!(
        (delivery.state, delivery.generation),
        (DeliveryState::Sent, 1)
    );
}

#[tokio::test]
async fn a_stream_outlives_an_outage_of_the_store() {
    let scene = with(|settings| settings.poll = Duration::from_millis(5)).await;
    scene.world.store.fail(&["claim_deliveries"]);
    let mut session = scene.open();
    session.credit(1);
    scene.publish([1]).await;
    scene.world.store.until_called("claim_deliveries", 3).await;
    scene.world.store.heal();
    assert_eq!(batch(&mut session).await.len(), 1);
}

#[tokio::test]
async fn a_service_that_stops_lets_answers_arrive_and_returns_the_rest_uncounted() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(10);
    scene.publish([1, 2]).await;
    let held = batch(&mut session).await;
    scene.broker.drain();
    scene.publish([3]).await;
    scene.consume(&held[..1]).await;
    scene.broker.shutdown(Duration::from_millis(50)).await;
    assert_eq!(next(&mut session).await, None);
    scene.until_streams(0).await;
    assert_eq!(scene.world.delivery(1).await.state, DeliveryState::Consumed);
    assert_eq!(scene.world.delivery(3).await.generation, 0);

    // The end of the service was not the delivery's fault, so it need not go alone.
    let next_start = Embedded::new(
        scene.world.store.clone(),
        scene.world.topology.clone(),
        scene.world.clock.clone(),
        Settings::default(),
    );
    let mut session = next_start
        .open("accounting".to_owned(), String::new())
        .unwrap();
    session.credit(10);
    let again = batch(&mut session).await;
    assert_eq!(again.len(), 2);
    assert!(!again[0].alone);
}

#[tokio::test]
async fn a_service_that_stops_does_not_wait_for_consumers_that_have_nothing() {
    let scene = scene().await;
    let mut session = scene.open();
    session.credit(10);
    tokio::time::timeout(DEADLINE, scene.broker.shutdown(NEVER))
        .await
        .unwrap();
    assert_eq!(next(&mut session).await, None);
}

#[tokio::test]
async fn a_backlog_costs_no_memory() {
    let scene = scene().await;
    for start in 0..10 {
        scene
            .world
            .publish(start * 500 + 1..=(start + 1) * 500)
            .await;
    }
    let mut session = scene.open();
    session.credit(10_000);
    let first = batch(&mut session).await;
    assert_eq!(first.len(), 500);
    // One batch is taken, and one waits in its place.
    scene.world.store.until_called("claim_deliveries", 2).await;
    assert!(scene.broker.lock().held() <= 1_000);
    let (grants, mut sendings) = session.split();
    let mut taken = first.len();
    while taken < 5_000 {
        taken += tokio::time::timeout(DEADLINE, sendings.next())
            .await
            .unwrap()
            .unwrap()
            .len();
    }
    grants.lost();
    scene.until_streams(0).await;
    assert_eq!(scene.world.store.calls("return_deliveries"), 10);
}

/// A consumer that answers some of what it gets and vanishes in the middle of the rest.
async fn unreliable(scene: Arc<Scene>, seed: u64, left: Arc<std::sync::atomic::AtomicUsize>) {
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    let mut chance = StdRng::seed_from_u64(seed);
    while left.load(Ordering::SeqCst) > 0 {
        let mut session = scene.open();
        for _ in 0..chance.random_range(1..8) {
            session.credit(chance.random_range(1..40));
            // Time passes on the clock that decides too, so that schedules come to their end.
            scene.world.clock.advance(Duration::from_secs(1));
            let wait = Duration::from_millis(20);
            let Ok(batch) = tokio::time::timeout(wait, session.next()).await else {
                continue;
            };
            for sending in batch.unwrap() {
                if chance.random_bool(0.9) {
                    scene.answer(&sending, AnswerKind::Consumed).await;
                    left.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_consumed_by_consumers_that_keep_vanishing() {
    const MESSAGES: usize = 400;
    let world = World::with_policy(crate::message::DeliveryPolicy {
        schedule: vec![Duration::from_secs(3)],
        attempts: crate::message::Attempts::Unlimited,
        max_age: None,
    })
    .await;
    let settings = Settings {
        poll: Duration::from_millis(5),
        sent_flush: Duration::from_millis(20),
        lease: NEVER,
        resend_after: NEVER,
        ..Settings::default()
    };
    let broker = Embedded::new(
        world.store.clone(),
        world.topology.clone(),
        world.clock.clone(),
        settings,
    );
    let scene = Arc::new(Scene { world, broker });
    scene.publish(1..=MESSAGES as u128).await;
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(MESSAGES));
    let consumers = (0..4).map(|seed| unreliable(Arc::clone(&scene), seed, Arc::clone(&left)));
    let all = futures_util::future::join_all(consumers);
    tokio::time::timeout(3 * DEADLINE, all).await.unwrap();
    scene.until_streams(0).await;
    assert_eq!(scene.broker.lock().held(), 0);
    let counts = scene.world.store.counts().await.unwrap();
    let accounting = &counts.subscriptions[0];
    assert_eq!((accounting.pending, accounting.sent), (0, 0));
}
