//! Several processes that want to run the same pass.

use super::*;
use crate::store::{Shared, TakeTurn};

const PERIOD: Duration = Duration::from_secs(60);

fn turn(pass: Shared, n: u128) -> TakeTurn {
    TakeTurn {
        pass,
        replica: Uuid::from_u128(n),
        period: PERIOD,
        again: false,
    }
}

/// A store whose passes were asked for before.
async fn ready_for(harness: &OnPostgres) -> &Arc<PostgresStore> {
    for pass in Shared::ALL {
        let first = harness.store.take_turn(turn(pass, 9)).await.unwrap();
        assert_eq!(first, Some(Duration::ZERO));
    }
    &harness.store
}

#[tokio::test]
async fn one_process_has_the_turn_and_the_others_learn_when_the_next_is() {
    let harness = open_with_clock().await;
    let (store, another) = (&harness.store, harness.another().await);
    for pass in Shared::ALL {
        let first = store.take_turn(turn(pass, 1)).await.unwrap();
        assert_eq!(first, Some(Duration::ZERO), "it is there from now on");
        assert_eq!(store.take_turn(turn(pass, 1)).await.unwrap(), None);
        for n in [1, 2] {
            let wait = another.take_turn(turn(pass, n)).await.unwrap().unwrap();
            assert!(wait <= PERIOD && wait > PERIOD / 2, "{wait:?}");
        }
    }
    harness.pass(PERIOD).await;
    let recovery = turn(Shared::Recovery, 2);
    assert_eq!(another.take_turn(recovery).await.unwrap(), None);
    assert!(store.take_turn(recovery).await.unwrap().is_some());
}

#[tokio::test]
async fn who_has_the_turn_keeps_it_until_it_is_another_ones() {
    let harness = open_with_clock().await;
    let store = ready_for(&harness).await;
    let again = |n| TakeTurn {
        again: true,
        ..turn(Shared::Retention, n)
    };
    let first = turn(Shared::Retention, 1);
    assert!(store.take_turn(again(1)).await.unwrap().is_some(), "none");
    assert_eq!(store.take_turn(first).await.unwrap(), None);
    harness.pass(PERIOD / 2).await;
    assert_eq!(store.take_turn(again(1)).await.unwrap(), None);
    assert!(store.take_turn(again(2)).await.unwrap().is_some());
    harness.pass(PERIOD * 3 / 4).await;
    let second = turn(Shared::Retention, 2);
    assert!(store.take_turn(second).await.unwrap().is_some(), "is kept");
    harness.pass(PERIOD / 2).await;
    assert_eq!(store.take_turn(second).await.unwrap(), None);
    assert!(
        store.take_turn(again(1)).await.unwrap().is_some(),
        "is lost"
    );
}

#[tokio::test]
async fn a_turn_that_is_too_far_away_is_due() {
    let harness = open_with_clock().await;
    let store = ready_for(&harness).await;
    let turn = turn(Shared::Recovery, 1);
    harness
        .run("UPDATE turn SET due_at = now() + interval '1 hour'")
        .await;
    assert_eq!(store.take_turn(turn).await.unwrap(), None);
    let wait = store.take_turn(turn).await.unwrap().unwrap();
    assert!(wait <= PERIOD, "{wait:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_ask_at_once_one_gets_it() {
    let harness = open_with_clock().await;
    let mut stores = vec![ready_for(&harness).await.clone()];
    for _ in 0..3 {
        stores.push(harness.another().await);
    }
    for _ in 0..20 {
        let mut asking = tokio::task::JoinSet::new();
        for (n, store) in (1..).zip(stores.clone()) {
            asking.spawn(async move { store.take_turn(turn(Shared::Recovery, n)).await });
        }
        let answers = asking.join_all().await;
        let taken = answers.iter().filter(|answer| matches!(answer, Ok(None)));
        assert_eq!(taken.count(), 1, "{answers:?}");
        harness.pass(PERIOD).await;
    }
}

#[tokio::test]
async fn a_turn_that_somebody_takes_slowly_is_another_ones() {
    let harness = open_with_clock().await;
    let store = ready_for(&harness).await;
    let mut slow = harness.by_hand().await;
    run(&mut slow, "BEGIN; SELECT FROM turn FOR UPDATE").await;
    let recovery = turn(Shared::Recovery, 1);
    assert_eq!(store.take_turn(recovery).await.unwrap(), Some(PERIOD));
    run(&mut slow, "COMMIT").await;
    assert_eq!(store.take_turn(recovery).await.unwrap(), None);
}
