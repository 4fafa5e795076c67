//! A fence that the pool's own hook chooses, beside others in the same database.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use handfast_producer::proto::v1::{MessageState, VerdictKind};
use handfast_producer::{FenceError, Outcome, StatusServer, StatusServerError, migrate};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Shop, buy, message};
use crate::asking::Asking;
use crate::scripted::PATIENCE;

/// A pool whose first so many connections work in a schema of their own, with its fence.
async fn in_own_schema(shop: &Shop, connections: usize) -> PgPool {
    sqlx::raw_sql("CREATE SCHEMA own; CREATE TABLE own.orders (id bigint NOT NULL)")
        .execute(&shop.pool)
        .await
        .unwrap();
    let made = Arc::new(AtomicUsize::new(0));
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(PATIENCE)
        .after_connect(move |connection, _| {
            let own = made.fetch_add(1, Ordering::SeqCst) < connections;
            Box::pin(async move {
                if own {
                    sqlx::raw_sql("SET search_path = own")
                        .execute(connection)
                        .await?;
                }
                Ok(())
            })
        })
        .connect_lazy_with(shop.scratch.options());
    migrate(&pool).await.unwrap();
    pool
}

#[tokio::test]
async fn checks_look_at_the_fence_that_the_pools_hook_has_chosen() {
    let shop = Shop::new().await;
    let pool = in_own_schema(&shop, usize::MAX).await;
    let bought = shop
        .producer
        .transact(&pool, message(), async |tx| buy(tx, 42).await)
        .await;
    assert_eq!(bought.unwrap(), Outcome::Committed(42));
    let id = shop.service.state().prepared[0];
    let mut asking = Asking::about(&pool).await;
    let kind = asking.ask(asking.question(id)).await;
    assert_eq!(kind, VerdictKind::Committed);
    assert_eq!(shop.service.states(), [MessageState::Confirmed]);
    assert_eq!(shop.verdict(id).await, None, "the other fence was asked");
}

#[tokio::test]
async fn checks_that_would_look_at_another_fence_are_refused() {
    for other in ["has a fence", "has none"] {
        let shop = Shop::new().await;
        let pool = in_own_schema(&shop, 1).await;
        if other == "has none" {
            sqlx::raw_sql("DROP TABLE handfast_fence_identity")
                .execute(&shop.pool)
                .await
                .unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let serving = StatusServer::new()
            .fence(pool)
            .serve_on(listener, CancellationToken::new());
        let served = timeout(PATIENCE, serving).await;
        let refused = served.expect("it serves").unwrap_err();
        assert!(
            matches!(refused, StatusServerError::Fence(FenceError::Elsewhere)),
            "{refused}"
        );
        assert!(!refused.to_string().contains('\n'));
    }
}
