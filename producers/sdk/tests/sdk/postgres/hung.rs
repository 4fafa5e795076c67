//! Connections that hear nothing any more, though nobody has closed them: each of them gives
//! its place in the pool back.

use std::time::Duration;

use handfast_producer::proto::v1::{MessageState, VerdictKind};
use handfast_producer::{FenceError, Outcome, Producer, TransactError};
use sqlx::PgPool;
use tokio::time::timeout;
use uuid::Uuid;

use super::proxy::Proxy;
use super::{Shop, buy, message, pool};
use crate::asking::Asking;
use crate::scripted::PATIENCE;

/// Long enough for what is answered.
const DEADLINE: Duration = Duration::from_secs(2);

/// A pool with one place, and the proxy between it and the shop's database.
async fn one_place(shop: &Shop) -> (Proxy, PgPool) {
    let proxy = Proxy::before(&shop.scratch.options()).await;
    let narrow = pool(proxy.options(shop.scratch.options()), 1);
    (proxy, narrow)
}

/// The one place of the pool is free, and what takes it works.
async fn buys_again(shop: &Shop, narrow: &PgPool, order: i64) {
    let bought = shop
        .producer
        .transact(narrow, message(), async |tx| buy(tx, order).await)
        .await;
    assert_eq!(bought.unwrap(), Outcome::Committed(order));
}

fn hasty(shop: &Shop) -> Producer {
    shop.producer.clone().with_deadline(DEADLINE)
}

#[tokio::test]
async fn a_fence_that_does_not_answer_is_read_until_the_deadline() {
    let shop = Shop::new().await;
    let (proxy, narrow) = one_place(&shop).await;
    proxy.swallow("handfast_fence_identity", 1);
    let hasty = hasty(&shop);
    let buying = hasty.transact(&narrow, message(), async |tx| buy(tx, 42).await);
    let failed = timeout(PATIENCE, buying).await.unwrap().unwrap_err();
    assert!(
        matches!(failed, TransactError::Fence(FenceError::Database { .. })),
        "{failed}"
    );
    buys_again(&shop, &narrow, 43).await;
}

#[tokio::test]
async fn a_begin_that_hangs_ends_with_the_deadline() {
    for begin in ["BEGIN", "INTO handfast_fence"] {
        let shop = Shop::new().await;
        let (proxy, narrow) = one_place(&shop).await;
        handfast_producer::Fence::open(&narrow).await.unwrap();
        proxy.swallow(begin, 1);
        let hasty = hasty(&shop);
        let buying = hasty.transact(&narrow, message(), async |tx| buy(tx, 42).await);
        let failed = timeout(PATIENCE, buying).await.unwrap().unwrap_err();
        assert!(matches!(failed, TransactError::Begin { .. }), "{failed}");
        buys_again(&shop, &narrow, 43).await;
        assert_eq!(shop.orders().await, 1, "{begin}");
    }
}

#[tokio::test]
async fn a_business_that_hangs_and_is_dropped_is_rolled_back() {
    let shop = Shop::new().await;
    let (proxy, narrow) = one_place(&shop).await;
    buys_again(&shop, &narrow, 41).await;
    proxy.swallow("hangs", 1);
    let buying = shop.producer.transact(&narrow, message(), async |tx| {
        buy(tx, 42).await?;
        sqlx::raw_sql("SELECT 'hangs'").execute(&mut **tx).await
    });
    tokio::select! {
        ended = buying => panic!("it was answered: {ended:?}"),
        () = proxy.until_silent(1) => {}
    }
    buys_again(&shop, &narrow, 43).await;
    assert_eq!(shop.orders().await, 2);
}

#[tokio::test]
async fn a_rollback_that_hangs_is_fenced_and_cancelled() {
    let shop = Shop::new().await;
    let (proxy, narrow) = one_place(&shop).await;
    let mut id = Uuid::nil();
    let failed = shop
        .producer
        .transact(&narrow, message(), async |tx| {
            id = tx.message_id();
            proxy.swallow("ROLLBACK", 1);
            Err::<(), _>("no")
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Business("no")), "{failed}");
    shop.producer.drain().await;
    assert_eq!(shop.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
    assert_eq!(shop.service.states(), [MessageState::Cancelled]);
    buys_again(&shop, &narrow, 43).await;
}

#[tokio::test]
async fn checks_go_on_after_both_of_their_connections_hung() {
    let shop = Shop::new().await;
    let proxy = Proxy::before(&shop.scratch.options()).await;
    let wide = pool(proxy.options(shop.scratch.options()), 4);
    let mut asking = Asking::about(&wide).await;
    let id = Uuid::now_v7();
    // The database's clock is looked at by the checks before anything else.
    proxy.swallow("clock_timestamp", 2);
    let hang = async {
        let mut other = asking.clone();
        let (one, two) = (asking.question(id), other.question(id));
        tokio::join!(asking.ask(one), other.ask(two))
    };
    let (hung, _) = tokio::join!(hang, proxy.until_silent(2));
    assert_eq!(hung, (VerdictKind::InProgress, VerdictKind::InProgress));
    let answered =
        async { while asking.ask(asking.question(id)).await != VerdictKind::RolledBack {} };
    timeout(2 * PATIENCE, answered).await.unwrap();
}
