//! A COMMIT whose outcome nobody was told.

use handfast_producer::proto::v1::{MessageState, VerdictKind};
use handfast_producer::{Outcome, TransactError};
use sqlx::PgPool;

use super::proxy::{Cut, Proxy};
use super::{Shop, buy, message, pool};
use crate::asking::Asking;

/// A proxy before the shop's database, and a pool behind which it stands.
async fn link(shop: &Shop) -> (Proxy, PgPool) {
    let proxy = Proxy::before(&shop.scratch.options()).await;
    let options = proxy.options(shop.scratch.options());
    (proxy, pool(options, 2))
}

#[tokio::test]
async fn a_commit_whose_reply_is_lost_is_confirmed() {
    let shop = Shop::new().await;
    let (proxy, pool) = link(&shop).await;
    let bought = shop
        .producer
        .transact(&pool, message(), async |tx| {
            proxy.cut(Cut::Reply);
            buy(tx, 42).await
        })
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert!(proxy.has_cut());
    shop.producer.drain().await;
    assert_eq!(shop.orders().await, 1);
    assert_eq!(shop.service.states(), [MessageState::Confirmed]);
    assert!(shop.service.calls("cancel").is_empty());
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_cancelled() {
    let shop = Shop::new().await;
    let (proxy, pool) = link(&shop).await;
    let failed = shop
        .producer
        .transact(&pool, message(), async |tx| {
            proxy.cut(Cut::Request);
            buy(tx, 42).await
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
    assert!(proxy.has_cut());
    shop.producer.drain().await;
    assert_eq!(shop.orders().await, 0);
    assert_eq!(shop.service.states(), [MessageState::Cancelled]);
}

#[tokio::test]
async fn a_commit_that_nobody_can_explain_is_never_cancelled() {
    let shop = Shop::new().await;
    let (proxy, pool) = link(&shop).await;
    let failed = shop
        .producer
        .transact(&pool, message(), async |tx| {
            proxy.cut(Cut::ReplyAndAll);
            buy(tx, 42).await
        })
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::OutcomeUnknown { .. }),
        "{failed}"
    );
    shop.producer.drain().await;
    assert_eq!(shop.orders().await, 1);
    assert_eq!(shop.service.states(), [MessageState::Prepared]);
    assert!(shop.service.calls("cancel").is_empty());
    // The check, which has a way to the database, finds out.
    let mut asking = Asking::about(&shop.pool).await;
    let id = shop.service.state().prepared[0];
    let kind = asking.ask(asking.question(id)).await;
    assert_eq!(kind, VerdictKind::Committed);
}
