//! Two processes on one database, and callers that go away.

use std::sync::atomic::Ordering;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::*;

const ROWS: u128 = 10_000;
const LIST: usize = 250;

/// All rows once, in random lists.
fn shuffled(seed: u64) -> Vec<Vec<u128>> {
    let mut numbers: Vec<u128> = (1..=ROWS).collect();
    numbers.shuffle(&mut StdRng::seed_from_u64(seed));
    numbers.chunks(LIST).map(<[u128]>::to_vec).collect()
}

fn keyed(n: u128) -> NewMessage {
    NewMessage {
        // Against the order of the ids.
        key: n.is_multiple_of(2).then(|| format!("order {}", ROWS - n)),
        ..paid(n)
    }
}

async fn prepare_and_publish(store: Arc<PostgresStore>, seed: u64) {
    for (round, list) in shuffled(seed).into_iter().enumerate() {
        let messages = list.into_iter().map(keyed).collect();
        if round % 3 == 0 {
            store.publish(messages, Handoff::none()).await.unwrap();
        } else {
            store.prepare(messages, Duration::ZERO).await.unwrap();
        }
    }
}

async fn decide(store: Arc<PostgresStore>, seed: u64) {
    for list in shuffled(seed) {
        let decisions = list
            .into_iter()
            .map(|n| Decision {
                id: id(n),
                event: if n % 7 == 0 {
                    MessageEvent::Cancel
                } else {
                    MessageEvent::Confirm
                },
            })
            .collect();
        store
            .decide("payment", decisions, Handoff::none())
            .await
            .unwrap();
    }
}

async fn check(store: Arc<PostgresStore>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..20 {
        let claims = store.claim_checks("payment", LIST, LEASE).await.unwrap();
        let results = claims
            .into_iter()
            .map(|claim| {
                let result = match rng.random_range(0..4) {
                    0 => CheckResult::Committed,
                    1 => CheckResult::RolledBack,
                    2 => CheckResult::Undecided { in_progress: true },
                    _ => CheckResult::Unanswered {
                        retry_after: Duration::ZERO,
                    },
                };
                (claim, result)
            })
            .collect();
        store
            .settle_checks("payment", CHECK_AFTER, results)
            .await
            .unwrap();
    }
}

async fn send(store: Arc<PostgresStore>, subscription: &'static str, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..20 {
        let mut claims = store
            .claim_deliveries(subscription, normal(LIST), LEASE)
            .await
            .unwrap()
            .deliveries;
        claims.shuffle(&mut rng);
        let sent: Vec<_> = claims
            .iter()
            .map(|claim| Sent {
                id: claim.id,
                token: claim.token,
            })
            .collect();
        store
            .renew(subscription, sent.clone(), LEASE)
            .await
            .unwrap();
        let (back, sent) = sent.split_at(sent.len() / 4);
        let unsent = back.iter().map(|sent| Unsent {
            id: sent.id,
            token: sent.token,
            why: crate::store::NotSent::Untried,
        });
        store
            .return_unsent(subscription, unsent.collect())
            .await
            .unwrap();
        store
            .mark_sent(subscription, sent.to_vec(), Duration::ZERO)
            .await
            .unwrap();
        let overdue = store.overdue(subscription, LIST).await.unwrap();
        let decisions = overdue
            .into_iter()
            .map(|overdue| (overdue, OverdueDecision::PassedBy))
            .collect();
        store.settle_overdue(subscription, decisions).await.unwrap();
    }
}

async fn answer(store: Arc<PostgresStore>, subscription: &'static str, seed: u64) {
    for list in shuffled(seed) {
        let answers = list
            .into_iter()
            .map(|n| Answer {
                kind: match n % 5 {
                    0 => AnswerKind::Failed("no".into()),
                    1 => AnswerKind::Later(Duration::ZERO),
                    _ => AnswerKind::Consumed,
                },
                ..consumed(n)
            })
            .collect();
        store.acknowledge(subscription, answers).await.unwrap();
    }
}

async fn keep_up(store: Arc<PostgresStore>) {
    for _ in 0..20 {
        store.open_buckets(Duration::from_secs(1)).await.unwrap();
        store.retire(store.now()).await.unwrap();
        store.counts().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_of_all_kinds_over_the_same_rows_never_deadlock() {
    let harness = ready().await;
    let stores = [harness.store.clone(), harness.another().await];
    let mut all = JoinSet::new();
    for (seed, store) in (1_u64..).zip(&stores) {
        all.spawn(prepare_and_publish(store.clone(), seed));
        all.spawn(decide(store.clone(), seed + 10));
        all.spawn(decide(store.clone(), seed + 20));
        all.spawn(check(store.clone(), seed + 30));
        for (more, subscription) in [(40, "accounting"), (50, "points")] {
            all.spawn(send(store.clone(), subscription, seed + more));
            all.spawn(answer(store.clone(), subscription, seed + more));
        }
        all.spawn(keep_up(store.clone()));
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
    for store in &stores {
        let most = store.repeats.most.load(Ordering::Relaxed);
        assert!(most <= 2, "a batch was repeated {most} times");
    }
    stores[1].close().await;
    harness.store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_claims_of_two_processes_share_nothing() {
    let harness = ready().await;
    let other = harness.another().await;
    for numbers in shuffled(1).into_iter().take(8) {
        let messages = numbers.into_iter().map(paid).collect();
        harness
            .store
            .publish(messages, Handoff::none())
            .await
            .unwrap();
    }
    let mut all = JoinSet::new();
    for store in [&harness.store, &other] {
        let store = store.clone();
        all.spawn(async move {
            let mut taken = Vec::new();
            loop {
                let claimed = store
                    .claim_deliveries("accounting", normal(37), LEASE)
                    .await
                    .unwrap();
                taken.extend(claimed.deliveries.iter().map(|claim| claim.id));
                if claimed.next_due_in != Some(Duration::ZERO) {
                    return taken;
                }
            }
        });
    }
    let mut taken = all.join_all().await.concat();
    taken.sort_unstable();
    let many = taken.len();
    taken.dedup();
    assert_eq!((many, taken.len()), (8 * LIST, 8 * LIST));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_calls_leave_no_session_inside_a_transaction() {
    let harness = ready().await;
    let clock = Arc::new(SystemClock::new());
    let address = Address::from(harness.database.options()).readers(1);
    let store = PostgresStore::open(address, clock, 3).await.unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    for n in 1..=1_000_u128 {
        let patience = Duration::from_micros(rng.random_range(0..3_000));
        let call = async {
            match n % 8 {
                0 => drop(store.publish(vec![paid(n)], Handoff::none()).await),
                1 => drop(store.prepare(vec![paid(n)], CHECK_AFTER).await),
                2 => drop(
                    store
                        .decide("payment", vec![confirm(n - 1)], Handoff::none())
                        .await,
                ),
                3 => drop(store.acknowledge("accounting", vec![consumed(n - 3)]).await),
                4 => drop(store.show(id(n - 4), true).await),
                5 => drop(store.counts().await),
                6 => drop(
                    store
                        .apply_topology(topology(
                            u64::try_from(n).unwrap(),
                            &["accounting", "points"],
                        ))
                        .await,
                ),
                _ => drop(store.claim_deliveries("points", normal(5), LEASE).await),
            }
        };
        // Whether it was done in time is not asked.
        drop(tokio::time::timeout(patience, call).await);
    }
    // Each lane and each reader does one thing more, so what was cancelled is over.
    store
        .publish(vec![paid(5_000)], Handoff::none())
        .await
        .unwrap();
    store.prepare(vec![paid(5_001)], CHECK_AFTER).await.unwrap();
    store
        .decide("payment", vec![confirm(5_001)], Handoff::none())
        .await
        .unwrap();
    let outcomes = store.acknowledge("points", vec![consumed(5_001)]).await;
    assert_eq!(outcomes.unwrap(), [AnswerOutcome::Recorded]);
    store
        .apply_topology(topology(9_999, &["accounting", "points"]))
        .await
        .unwrap();
    store
        .claim_deliveries("points", normal(5), LEASE)
        .await
        .unwrap();
    store.counts().await.unwrap();
    let inside: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity
          WHERE datname = current_database() AND state LIKE 'idle in transaction%'",
    )
    .fetch_one(&mut harness.by_hand().await)
    .await
    .unwrap();
    assert_eq!(inside, 0);
    store.close().await;
}
