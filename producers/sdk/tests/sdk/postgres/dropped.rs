//! Callers who go away in the middle.

use std::time::{Duration, Instant};

use handfast_producer::Outcome;
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::{Shop, buy, message, pool};

/// Calls at the same time.
const TOGETHER: usize = 7;

/// Parts of a whole that repeat from run to run.
fn parts() -> impl Iterator<Item = f64> {
    let mut state = 42_u64;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1_u32 << 31)
    })
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

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_dropped_calls_leave_no_transaction_open() {
    for connections in [1, 3] {
        let shop = Shop::new().await;
        let small = pool(shop.scratch.options(), connections);
        // When a call is in its middle depends on the machine and on what else it does, so each is
        // dropped within twice what the last one took that was not.
        let mut takes = Duration::from_millis(20);
        let (mut calls, mut done, mut dropped) = (JoinSet::new(), 0, 0);
        for (order, part) in (0..).zip(parts()) {
            if calls.len() == TOGETHER {
                match calls.join_next().await.unwrap().unwrap() {
                    Some(took) => (done, takes) = (done + 1, took),
                    None => (dropped, takes) = (dropped + 1, takes.mul_f64(1.02)),
                }
            }
            if done >= 100 && dropped >= 500 {
                break;
            }
            call(&mut calls, &shop, &small, order, takes.mul_f64(2.0 * part));
        }
        calls.join_all().await;
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
