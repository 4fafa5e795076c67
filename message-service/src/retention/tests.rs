use std::sync::atomic::Ordering;

use super::*;
use crate::world::World;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

fn reading(store: Duration, monotonic: Duration) -> Reading {
    Reading {
        store: Timestamp::default().after(store),
        monotonic,
    }
}

#[test]
fn the_first_reading_is_no_ground_to_remove_anything() {
    let mut trust = Trust::default();
    assert_eq!(
        trust.judge(reading(HOUR, Duration::ZERO)),
        Judgement::NoReference
    );
    assert_eq!(
        trust.judge(reading(HOUR + MINUTE, MINUTE)),
        Judgement::Prune
    );
}

#[test]
fn a_jump_ahead_stops_removing_for_an_hour() {
    let mut trust = Trust::default();
    let year = 8_760 * HOUR;
    trust.judge(reading(HOUR, Duration::ZERO));
    let jumped = trust.judge(reading(HOUR + year, MINUTE));
    assert!(matches!(jumped, Judgement::Jumped { micros } if micros > 0));
    let later = |passed: Duration| reading(HOUR + year + passed, MINUTE + passed);
    assert_eq!(trust.judge(later(HOUR - MINUTE)), Judgement::Distrusted);
    assert_eq!(trust.judge(later(HOUR)), Judgement::Prune);
}

#[test]
fn the_way_back_is_a_jump_too() {
    let mut trust = Trust::default();
    trust.judge(reading(2 * HOUR, Duration::ZERO));
    let jumped = trust.judge(reading(HOUR, MINUTE));
    assert!(matches!(jumped, Judgement::Jumped { micros } if micros < 0));
}

#[test]
fn a_minute_more_or_less_is_tolerated() {
    let mut trust = Trust::default();
    trust.judge(reading(HOUR, Duration::ZERO));
    assert_eq!(
        trust.judge(reading(HOUR + MINUTE, Duration::ZERO)),
        Judgement::Prune
    );
    assert_eq!(trust.judge(reading(HOUR, Duration::ZERO)), Judgement::Prune);
}

#[tokio::test]
async fn finished_messages_go_after_their_time_and_unfinished_ones_stay() {
    let world = World::new().await;
    let retention = Retention::new(
        world.store.clone(),
        world.clock.clone(),
        Settings::default(),
    );
    world.prepare([1]).await;
    let cancelled = crate::store::Decision {
        id: crate::world::id(1),
        event: crate::message::MessageEvent::Cancel,
    };
    world
        .store
        .decide("payment", vec![cancelled], crate::store::Handoff::none())
        .await
        .unwrap();
    world.publish([2]).await;

    world.clock.advance(24 * 8 * HOUR);
    assert!(!retention.run_once().await.unwrap().pruned);
    world.clock.advance(MINUTE);
    let report = retention.run_once().await.unwrap();
    assert_eq!((report.pruned, report.messages), (true, 1));
    let counts = world.store.counts().await.unwrap();
    assert_eq!((counts.cancelled, counts.confirmed), (0, 1));
}

/// 600 messages that were finished long ago, and a turn that is asked for again after every slice.
async fn with_much_to_remove() -> (World, Arc<Retention>, Turn) {
    let world = World::new().await;
    let settings = Settings::default();
    let retention = Retention::new(world.store.clone(), world.clock.clone(), settings);
    for first in [1, 301] {
        let numbers = first..first + 300;
        world.prepare(numbers.clone()).await;
        let cancel = |n| crate::store::Decision {
            id: crate::world::id(n),
            event: crate::message::MessageEvent::Cancel,
        };
        let cancels = numbers.map(cancel).collect();
        let handoff = crate::store::Handoff::none();
        let cancelled = world.store.decide("payment", cancels, handoff).await;
        cancelled.unwrap();
    }
    world.clock.advance(24 * 8 * HOUR);
    let (pass, replica) = (store::Shared::Retention, uuid::Uuid::from_u128(1));
    let turn = Turn::new(world.store.clone(), pass, replica, Duration::ZERO);
    (world, retention, turn)
}

#[tokio::test]
async fn who_has_not_the_turn_removes_nothing_and_has_read_the_clock_when_it_comes() {
    let (world, retention, turn) = with_much_to_remove().await;
    let store = &world.store;
    store.turn_is_anothers.store(true, Ordering::SeqCst);
    let next = retention.take_turn(&turn).await.unwrap();
    assert_eq!(next, Next::NotBefore(Duration::ZERO));
    assert_eq!((store.calls("open_buckets"), store.calls("retire")), (0, 0));
    store.turn_is_anothers.store(false, Ordering::SeqCst);
    world.clock.advance(MINUTE);
    retention.take_turn(&turn).await.unwrap();
    assert_eq!(store.calls("open_buckets"), 1);
    assert_eq!(store.counts().await.unwrap().cancelled, 0);
}

#[tokio::test]
async fn who_loses_the_turn_leaves_the_other_slices() {
    let (world, retention, turn) = with_much_to_remove().await;
    assert!(!retention.run_once().await.unwrap().pruned);
    world.clock.advance(MINUTE);
    world.store.turn_is_lost.store(true, Ordering::SeqCst);
    retention.take_turn(&turn).await.unwrap();
    assert_eq!(world.store.calls("retire"), 1, "one slice");
    let left = world.store.counts().await.unwrap().cancelled;
    assert!((1..600).contains(&left), "{left}");
}
