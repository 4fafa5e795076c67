//! Callers who go away in the middle.

use std::time::Duration;

use handfast_producer::Outcome;
use tokio::task::JoinSet;

use super::{Shop, buy, message, pool};

/// Moments that repeat from run to run, spread over what a call takes.
fn moments(count: usize) -> impl Iterator<Item = Duration> {
    let mut state = 42_u64;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros((state >> 33) % 40_000)
    })
    .take(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_dropped_calls_leave_no_transaction_open() {
    for connections in [1, 3] {
        let shop = Shop::new().await;
        let small = pool(shop.scratch.options(), connections);
        let mut calls = JoinSet::new();
        let (mut done, mut dropped) = (0, 0);
        for (order, moment) in moments(500).enumerate() {
            let (producer, small) = (shop.producer.clone(), small.clone());
            calls.spawn(async move {
                let bought = producer.transact(&small, message(), async |tx| {
                    buy(tx, order as i64).await?;
                    // Something that takes a while on the server.
                    sqlx::query("SELECT pg_sleep(0.001)")
                        .execute(&mut **tx)
                        .await?;
                    Ok::<_, sqlx::Error>(())
                });
                match tokio::time::timeout(moment, bought).await {
                    Ok(bought) => assert_eq!(bought.unwrap(), Outcome::Committed(())),
                    Err(_) => return false,
                }
                true
            });
            while calls.len() > 6 {
                match calls.join_next().await.unwrap().unwrap() {
                    true => done += 1,
                    false => dropped += 1,
                }
            }
        }
        for finished in calls.join_all().await {
            match finished {
                true => done += 1,
                false => dropped += 1,
            }
        }
        assert!(done > 0 && dropped > 100, "{done} done, {dropped} dropped");
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
