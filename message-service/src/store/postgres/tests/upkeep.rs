//! Buckets, leases and clocks: what keeps a store going for years.

use tokio::time::Instant;

use super::*;
use crate::retention::{self, Retention};

const DAY: Duration = Duration::from_secs(86_400);

impl OnPostgres {
    async fn buckets(&self) -> Vec<i64> {
        sqlx::query_scalar("SELECT number FROM body_bucket ORDER BY number")
            .fetch_all(&mut self.by_hand().await)
            .await
            .unwrap()
    }

    async fn bucket_of(&self, n: u128) -> i64 {
        sqlx::query_scalar("SELECT bucket FROM message WHERE id = $1")
            .bind(Uuid::from_u128(n))
            .fetch_one(&mut self.by_hand().await)
            .await
            .unwrap()
    }

    /// Whether somebody waits for a lock on a table.
    async fn somebody_waits(&self) -> bool {
        // The server is shared, and others may well wait in their databases.
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity
                                   WHERE wait_event_type = 'Lock' AND datname = current_database())";
        sqlx::query_scalar(sql)
            .fetch_one(&mut self.by_hand().await)
            .await
            .unwrap()
    }
}

/// A store with a clock that can be moved, and a topology.
async fn timed() -> OnPostgres {
    let harness = open_with_clock().await;
    let topology = topology(1, &["accounting", "points"]);
    harness.store.apply_topology(topology).await.unwrap();
    harness
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_holds_up_no_prepare_while_buckets_come_and_go() {
    let harness = timed().await;
    let store = &harness.store;
    store.prepare(vec![paid(1)], CHECK_AFTER).await.unwrap();
    for _ in 0..4 {
        harness.pass(DAY).await;
        store.open_buckets(DAY).await.unwrap();
    }
    let mut reader = harness.by_hand().await;
    run(&mut reader, "BEGIN; SELECT count(*) FROM body_1").await;
    let retiring = {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..5 {
                store.retire(store.now().before(DAY)).await.unwrap();
                store.open_buckets(DAY).await.unwrap();
            }
        })
    };
    let mut slowest = Duration::ZERO;
    let mut n = 1_000;
    while !retiring.is_finished() {
        let began = Instant::now();
        store.prepare(vec![paid(n)], CHECK_AFTER).await.unwrap();
        slowest = slowest.max(began.elapsed());
        n += 1;
    }
    retiring.await.unwrap();
    assert!(slowest < Duration::from_millis(200), "{slowest:?}");
    assert_eq!(harness.buckets().await[0], 1, "it is being read");
    run(&mut reader, "ROLLBACK").await;
    while store.retire(store.now().before(DAY)).await.unwrap().more {}
    assert!(harness.buckets().await[0] > 1);
    let shown = store.show(id(1), true).await.unwrap().unwrap();
    assert_eq!(shown.body.unwrap().1, paid(1).payload, "it is undecided");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_was_closed_or_dropped_meanwhile_takes_nothing_more() {
    let harness = timed().await;
    let store = &harness.store;
    store.prepare(vec![paid(1)], CHECK_AFTER).await.unwrap();
    store.publish(vec![paid(2)], Handoff::none()).await.unwrap();
    harness
        .run("UPDATE body_bucket SET closed = true WHERE number = 1")
        .await;
    // The lanes still know the closed one.
    store.prepare(vec![paid(3)], CHECK_AFTER).await.unwrap();
    store.publish(vec![paid(4)], Handoff::none()).await.unwrap();
    assert_eq!(
        (harness.bucket_of(3).await, harness.bucket_of(4).await),
        (2, 2)
    );
    harness
        .run("DELETE FROM body_bucket WHERE number = 2; DROP TABLE body_2")
        .await;
    store.prepare(vec![paid(5)], CHECK_AFTER).await.unwrap();
    store.publish(vec![paid(6)], Handoff::none()).await.unwrap();
    assert_eq!(
        (harness.bucket_of(5).await, harness.bucket_of(6).await),
        (3, 3)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_is_not_emptied_before_its_last_writer_is_done() {
    let harness = timed().await;
    let store = &harness.store;
    store.prepare(vec![paid(9)], CHECK_AFTER).await.unwrap();
    for _ in 0..4 {
        harness.pass(DAY).await;
        store.open_buckets(DAY).await.unwrap();
    }
    // A batch that is on its way, as a process that is frozen in the middle of it.
    let mut writer = harness.by_hand().await;
    run(
        &mut writer,
        &format!(
            "BEGIN;
             INSERT INTO message (id, producer, topic, state, content_hash, bucket, body_bytes,
                                  check_at, prepared_at)
             VALUES ('{0}', 'payment', 'paid', 'PREPARED', '', 1, 1, now(), now());
             INSERT INTO body_1 (message_id, content_type, headers, payload)
             VALUES ('{0}', '', '[]', 'x')",
            id(1)
        ),
    )
    .await;
    let retired = store.retire(store.now().before(DAY)).await.unwrap();
    assert_eq!(retired, Retired::default());
    run(&mut writer, "COMMIT").await;
    let mut moved = 0;
    loop {
        let retired = store.retire(store.now().before(DAY)).await.unwrap();
        moved += retired.moved;
        if !retired.more {
            break;
        }
    }
    assert_eq!(moved, 2);
    for n in [1, 9] {
        assert!(
            store
                .show(id(n), true)
                .await
                .unwrap()
                .unwrap()
                .body
                .is_some()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_open_and_empty_buckets_at_the_same_time() {
    let harness = timed().await;
    let other = harness.another().await;
    let messages = (1..=300).map(paid).collect();
    harness
        .store
        .publish(messages, Handoff::none())
        .await
        .unwrap();
    for n in (1..=300).step_by(3) {
        for subscription in ["accounting", "points"] {
            let answers = vec![consumed(n)];
            harness
                .store
                .acknowledge(subscription, answers)
                .await
                .unwrap();
        }
    }
    for _ in 0..3 {
        harness.pass(DAY).await;
        let (one, two) = tokio::join!(harness.store.open_buckets(DAY), other.open_buckets(DAY));
        one.and(two).unwrap();
    }
    let cutoff = harness.store.now().before(DAY);
    let retire = |store: Arc<PostgresStore>| async move {
        let mut total = (0, 0);
        for _ in 0..20 {
            let retired = store.retire(cutoff).await.unwrap();
            total = (total.0 + retired.messages, total.1 + retired.moved);
        }
        total
    };
    let (one, two) = tokio::join!(retire(harness.store.clone()), retire(other.clone()));
    assert_eq!((one.0 + two.0, one.1 + two.1), (100, 200));
    assert!(!harness.buckets().await.contains(&1));
    assert!(!harness.somebody_waits().await);
    let left = harness
        .store
        .claim_deliveries("points", normal(500), LEASE)
        .await
        .unwrap();
    assert_eq!(left.deliveries.len(), 200, "with their bodies");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_finds_a_bucket_half_emptied_goes_on_at_once() {
    let harness = timed().await;
    let store = &harness.store;
    let messages = (1..=450).map(paid).collect();
    store.prepare(messages, CHECK_AFTER).await.unwrap();
    let cancel = |n| Decision {
        id: id(n),
        event: MessageEvent::Cancel,
    };
    let cancels = (1..=450).map(cancel).collect();
    store
        .decide("payment", cancels, Handoff::none())
        .await
        .unwrap();
    for _ in 0..4 {
        harness.pass(DAY).await;
        store.open_buckets(DAY).await.unwrap();
    }
    for _ in 0..4 {
        let retired = store.retire(store.now().before(DAY)).await.unwrap();
        assert_eq!(retired.messages, 100);
    }
    let other = harness.another().await;
    let settings = retention::Settings {
        keep: DAY,
        ..retention::Settings::default()
    };
    let retention = Retention::new(other, Arc::new(SystemClock::new()), settings);
    let reference = retention.run_once().await.unwrap();
    assert!(!reference.pruned, "there is no other reading of the clock");
    let report = retention.run_once().await.unwrap();
    assert_eq!(report.messages, 50, "all that was left");
    assert!(report.buckets >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_subscription_is_not_settled_over_a_delivery_that_is_locked() {
    let harness = timed().await;
    let store = &harness.store;
    store.publish(vec![paid(1)], Handoff::none()).await.unwrap();
    store
        .apply_topology(topology(2, &["points"]))
        .await
        .unwrap();
    let open = "UPDATE delivery SET state = 'PENDING', due_at = now(), answered_at = NULL
                 WHERE subscription = 'accounting'";
    harness.run(open).await;
    let mut other = harness.by_hand().await;
    let lock = "BEGIN; SELECT FROM delivery WHERE subscription = 'accounting' FOR UPDATE";
    run(&mut other, lock).await;
    harness.pass(Duration::from_secs(61)).await;
    store.open_buckets(DAY).await.unwrap();
    let look = async || {
        let row = "SELECT s.settled, d.state FROM subscription s
                     JOIN delivery d ON d.subscription = s.name WHERE s.name = 'accounting'";
        sqlx::query_as::<_, (bool, String)>(row)
            .fetch_one(&mut harness.by_hand().await)
            .await
            .unwrap()
    };
    assert_eq!(look().await, (false, "PENDING".to_owned()));
    run(&mut other, "ROLLBACK").await;
    store.open_buckets(DAY).await.unwrap();
    assert_eq!(look().await, (true, "SKIPPED".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_late_confirm_adds_to_a_removed_subscription_is_skipped_too() {
    let harness = timed().await;
    let store = &harness.store;
    store.publish(vec![paid(1)], Handoff::none()).await.unwrap();
    store
        .apply_topology(topology(2, &["points"]))
        .await
        .unwrap();
    // As a confirm does that began before the removal.
    harness
        .run(
            "UPDATE delivery SET state = 'PENDING', due_at = now(), answered_at = NULL
              WHERE subscription = 'accounting'",
        )
        .await;
    store.open_buckets(DAY).await.unwrap();
    let shown = store.show(id(1), false).await.unwrap().unwrap();
    let states: Vec<_> = shown.deliveries.iter().map(|view| view.state).collect();
    assert_eq!(states, [DeliveryState::Skipped, DeliveryState::Pending]);
    let settled = "SELECT settled FROM subscription WHERE name = 'accounting'";
    for (wait, is_settled) in [(0, false), (61, true)] {
        harness.pass(Duration::from_secs(wait)).await;
        store.open_buckets(DAY).await.unwrap();
        let settled: bool = sqlx::query_scalar(settled)
            .fetch_one(&mut harness.by_hand().await)
            .await
            .unwrap();
        assert_eq!(settled, is_settled);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_moves_to_another_topic_leaves_its_deliveries_behind() {
    let harness = timed().await;
    let store = &harness.store;
    store.publish(vec![paid(1)], Handoff::none()).await.unwrap();
    let mut moved = topology(2, &["accounting", "points"]);
    moved.topics.insert("refunded".into(), Topic::default());
    if let Some(points) = moved.subscriptions.get_mut("points") {
        points.topic = "refunded".into();
    }
    store.apply_topology(moved).await.unwrap();
    let refunded = NewMessage {
        topic: "refunded".into(),
        ..paid(2)
    };
    store
        .publish(vec![refunded], Handoff::none())
        .await
        .unwrap();
    let claimed = store
        .claim_deliveries("points", normal(9), LEASE)
        .await
        .unwrap();
    let ids: Vec<_> = claimed.deliveries.iter().map(|claim| claim.id).collect();
    assert_eq!(ids, [id(2)]);
    let shown = store.show(id(1), false).await.unwrap().unwrap();
    assert_eq!(shown.deliveries[1].state, DeliveryState::Skipped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_that_a_clock_left_in_the_future_count_as_expired() {
    let harness = timed().await;
    let store = &harness.store;
    store.publish(vec![paid(1)], Handoff::none()).await.unwrap();
    store.prepare(vec![paid(2)], Duration::ZERO).await.unwrap();
    harness.pass(DAY).await;
    let claim = || store.claim_deliveries("points", normal(9), LEASE);
    assert_eq!(claim().await.unwrap().deliveries.len(), 1);
    let check = || store.claim_checks("payment", 9, LEASE);
    assert_eq!(check().await.unwrap().len(), 1);
    assert!(claim().await.unwrap().deliveries.is_empty());
    assert!(check().await.unwrap().is_empty());
    // Somebody sets the clock right, a day back.
    harness.run("UPDATE clock_offset SET ahead = '0'").await;
    assert_eq!(claim().await.unwrap().deliveries.len(), 1);
    assert_eq!(check().await.unwrap().len(), 1);
    assert!(claim().await.unwrap().deliveries.is_empty(), "once");
    // What is published now is due by the clock as it is now.
    store.publish(vec![paid(3)], Handoff::none()).await.unwrap();
    assert_eq!(claim().await.unwrap().deliveries.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_is_the_databases() {
    let harness = timed().await;
    harness.pass(DAY).await;
    let before = harness.store.now();
    harness
        .store
        .publish(vec![paid(1)], Handoff::none())
        .await
        .unwrap();
    let shown = harness.store.show(id(1), false).await.unwrap().unwrap();
    let off = shown
        .message
        .prepared_at
        .since(before)
        .max(before.since(shown.message.prepared_at));
    assert!(off < Duration::from_secs(2), "{off:?}");
}
