//! Callers who go away in the middle.

use std::time::{Duration, Instant};

use handfast_producer::Outcome;
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::{Shop, buy, message, pool};

/// Calls at the same time.
const TOGETHER: usize = 7;

/// Moments that repeat from run to run, as parts of twice what a call takes.
fn moments(takes: Duration, count: usize) -> impl Iterator<Item = Duration> {
    let mut state = 42_u64;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        takes.mul_f64((state >> 33) as f64 / f64::from(1_u32 << 30))
    })
    .take(count)
}

/// Starts a call that gives up after so long. It says how long it took, if it did not give up.
fn call(
    calls: &mut JoinSet<Option<Duration>>,
    shop: &Shop,
    pool: &PgPool,
    order: i64,
    moment: Duration,
) {
    let (producer, pool) = (shop.producer.clone(), pool.clone());
    calls.spawn(async move {
        let began = Instant::now();
        let bought = producer.transact(&pool, message(), async |tx| {
            buy(tx, order).await?;
            // Something that takes a while on the server.
            sqlx::query("SELECT pg_sleep(0.001)")
                .execute(&mut **tx)
                .await?;
            Ok::<_, sqlx::Error>(())
        });
        let bought = tokio::time::timeout(moment, bought).await.ok()?;
        assert_eq!(bought.unwrap(), Outcome::Committed(()));
        Some(began.elapsed())
    });
}

/// Runs a call for each moment, some at a time. Returns how long those took that did not give up.
async fn run(
    shop: &Shop,
    pool: &PgPool,
    moments: impl IntoIterator<Item = Duration>,
) -> Vec<Duration> {
    let (mut calls, mut took) = (JoinSet::new(), Vec::new());
    for (order, moment) in moments.into_iter().enumerate() {
        if calls.len() == TOGETHER {
            took.extend(calls.join_next().await.unwrap().unwrap());
        }
        call(&mut calls, shop, pool, order as i64, moment);
    }
    took.extend(calls.join_all().await.into_iter().flatten());
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_dropped_calls_leave_no_transaction_open() {
    for connections in [1, 3] {
        let shop = Shop::new().await;
        let small = pool(shop.scratch.options(), connections);
        // How long a call takes depends on the machine, and when it is dropped depends on that.
        let mut undisturbed = run(&shop, &small, vec![Duration::from_secs(60); 101]).await;
        undisturbed.sort();
        let takes = undisturbed[50];
        let done = run(&shop, &small, moments(takes, 500)).await.len();
        let dropped = 500 - done;
        assert!(
            done > 0 && dropped > 100,
            "{done} done, {dropped} dropped, {takes:?}"
        );
        shop.producer.drain().await;
        shop.until(
            "sessions without a transaction",
            "SELECT count(*) = 0 FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()
                AND state <> 'idle'",
        )
        .await;
        // Every connection is there again, and works.
        for order in 0..i64::from(connections) * 2 {
            let bought = shop
                .producer
                .transact(&small, message(), async |tx| buy(tx, order).await)
                .await;
            assert_eq!(bought.unwrap(), Outcome::Committed(order));
        }
        let committed = "SELECT count(*) FROM handfast_fence WHERE verdict = 'COMMITTED'";
        assert_eq!(shop.orders().await, shop.count(committed).await);
    }
}
