//! The business transaction on PostgreSQL.

use handfast_producer::proto::v1::MessageState;
use handfast_producer::{Fence, FenceError, Outcome, TransactError, Tx};
use sqlx::{AssertSqlSafe, PgPool, Postgres};
use uuid::Uuid;

use super::{LEVELS, Shop, buy, message, pool};
use crate::scripted::PATIENCE;

#[tokio::test]
async fn a_commit_confirms_and_a_failure_cancels_at_every_level() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let mut id = Uuid::nil();
        let bought = shop
            .producer
            .transact(&shop.pool, message(), async |tx| {
                id = tx.message_id();
                buy(tx, 42).await
            })
            .await
            .unwrap();
        assert_eq!(bought, Outcome::Committed(42));
        assert_eq!(shop.verdict(id).await.as_deref(), Some("COMMITTED"));
        let state = shop.service.message_state(id);
        assert_eq!(state, Some(MessageState::Confirmed));

        let failed = shop
            .producer
            .transact(&shop.pool, message(), async |tx| {
                id = tx.message_id();
                buy(tx, 43).await.unwrap();
                Err::<(), _>("no")
            })
            .await
            .unwrap_err();
        assert!(matches!(failed, TransactError::Business("no")), "{failed}");
        assert_eq!(shop.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
        let state = shop.service.message_state(id);
        assert_eq!(state, Some(MessageState::Cancelled));
        assert_eq!(shop.orders().await, 1);
    }
}

#[tokio::test]
async fn the_business_keeps_the_level_of_its_pool() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let found = shop
            .producer
            .transact(&shop.pool, message(), async |tx: &mut Tx<Postgres>| {
                sqlx::query_scalar::<_, String>("SHOW transaction_isolation")
                    .fetch_one(&mut **tx)
                    .await
            })
            .await
            .unwrap();
        assert_eq!(found, Outcome::Committed(level.to_owned()));
    }
}

#[tokio::test]
async fn the_business_commits_durably_though_its_pool_would_not() {
    let shop = Shop::new().await;
    let hasty = shop
        .scratch
        .options()
        .options([("synchronous_commit", "off")]);
    let found = shop
        .producer
        .transact(&pool(hasty, 1), message(), async |tx| {
            sqlx::query_scalar::<_, String>("SHOW synchronous_commit")
                .fetch_one(&mut **tx)
                .await
        })
        .await
        .unwrap();
    assert_eq!(found, Outcome::Committed("on".to_owned()));
}

#[tokio::test]
async fn businesses_do_not_refuse_each_other_because_of_the_fence() {
    let shop = Shop::at("serializable").await;
    let (producer, pool) = (&shop.producer, &shop.pool);
    // Two serializable transactions that overlap in every possible way, round after round.
    for round in 0..20 {
        let buying = [round * 2, round * 2 + 1]
            .map(|order| producer.transact(pool, message(), async move |tx| buy(tx, order).await));
        let [one, other] = buying;
        let (one, other) = tokio::join!(one, other);
        one.unwrap();
        other.unwrap();
    }
    assert_eq!(shop.orders().await, 40);
}

#[tokio::test]
async fn a_swallowed_error_is_not_taken_for_a_commit() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let failed = shop
            .producer
            .transact(&shop.pool, message(), async |tx| {
                buy(tx, 42).await?;
                let broken = sqlx::query("SELECT 1 / 0").execute(&mut **tx).await;
                assert!(broken.is_err());
                // PostgreSQL answers COMMIT with ROLLBACK now, which is no error.
                Ok::<_, sqlx::Error>(())
            })
            .await
            .unwrap_err();
        assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
        shop.producer.drain().await;
        assert_eq!(shop.orders().await, 0);
        assert_eq!(shop.service.states(), [MessageState::Cancelled]);
    }
}

#[tokio::test]
async fn a_business_that_rolls_back_by_itself_is_not_taken_for_a_commit() {
    let shop = Shop::new().await;
    let failed = shop
        .producer
        .transact(&shop.pool, message(), async |tx| {
            buy(tx, 42).await?;
            sqlx::query("ROLLBACK").execute(&mut **tx).await
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
    shop.producer.drain().await;
    assert_eq!(shop.service.states(), [MessageState::Cancelled]);
}

#[tokio::test]
async fn a_savepoint_of_the_business_may_fail() {
    use sqlx::Connection as _;
    let shop = Shop::new().await;
    let bought = shop
        .producer
        .transact(&shop.pool, message(), async |tx| {
            let mut inner = tx.begin().await?;
            let broken = sqlx::query("SELECT 1 / 0").execute(&mut *inner).await;
            assert!(broken.is_err());
            inner.rollback().await?;
            buy(tx, 42).await
        })
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert_eq!(shop.orders().await, 1);
}

#[tokio::test]
async fn a_commit_that_a_constraint_refuses_is_cancelled() {
    let shop = Shop::new().await;
    let failed = shop
        .producer
        .transact(&shop.pool, message(), async |tx| {
            // No such shop: the constraint is looked at by COMMIT.
            sqlx::query("INSERT INTO deferred (shop) VALUES (7)")
                .execute(&mut **tx)
                .await
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
    shop.producer.drain().await;
    assert_eq!(shop.service.states(), [MessageState::Cancelled]);
    assert_eq!(shop.count("SELECT count(*) FROM deferred").await, 0);
}

#[tokio::test]
async fn a_database_without_a_fence_is_refused() {
    let shop = Shop::new().await;
    sqlx::raw_sql("DROP TABLE handfast_fence_identity")
        .execute(&shop.pool)
        .await
        .unwrap();
    let failed = shop
        .producer
        .transact(&shop.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::Fence(FenceError::Missing { .. })),
        "{failed}"
    );
    assert!(shop.service.state().calls.is_empty());
}

#[tokio::test]
async fn a_server_that_forgets_at_a_power_cut_is_refused() {
    let shop = Shop::new().await;
    // A server of its own, because the setting is everybody's.
    let server = tokio::task::spawn_blocking(handfast_servers::Postgres::start)
        .await
        .unwrap()
        .unwrap();
    let weak = pool(server.url("postgres").parse().unwrap(), 1);
    handfast_producer::migrate(&weak).await.unwrap();
    for setting in ["fsync", "full_page_writes"] {
        for value in ["off", "on"] {
            for sql in [
                format!("ALTER SYSTEM SET {setting} = {value}"),
                "SELECT pg_reload_conf()".to_owned(),
            ] {
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&weak)
                    .await
                    .unwrap();
            }
            // A session hears of it some time later.
            let heard = async { while found(&weak, setting).await != value {} };
            tokio::time::timeout(PATIENCE, heard).await.unwrap();
            let opened = Fence::open(&weak).await;
            match value {
                "off" => assert!(matches!(opened, Err(FenceError::NotDurable { .. }))),
                _ => drop(opened.unwrap()),
            }
            if value == "off" {
                let failed = shop
                    .producer
                    .transact(&weak, message(), async |tx| buy(tx, 42).await)
                    .await
                    .unwrap_err();
                let refused = TransactError::Fence(FenceError::NotDurable {
                    setting: format!("`{setting}` is off"),
                    remedy: "set it to on in postgresql.conf",
                });
                assert_eq!(
                    failed.to_string(),
                    TransactError::<sqlx::Error>::to_string(&refused)
                );
            }
        }
    }
    assert!(shop.service.state().calls.is_empty());
    drop(weak);
    tokio::task::spawn_blocking(move || drop(server))
        .await
        .unwrap();
}

async fn found(pool: &PgPool, setting: &str) -> String {
    sqlx::query_scalar("SELECT current_setting($1)")
        .bind(setting)
        .fetch_one(pool)
        .await
        .unwrap()
}
