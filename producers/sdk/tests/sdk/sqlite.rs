//! A transaction that SQLite ends by itself takes everything with it, and leaves nothing behind.

use handfast_producer::proto::v1::MessageState;
use handfast_producer::{Outcome, TransactError};
use sqlx::sqlite::SqlitePoolOptions;
use sqlx::{Connection as _, SqliteConnection, SqlitePool};
use tokio::sync::Notify;

use crate::scripted::PATIENCE;
use crate::world::{World, buy, message, options};

/// How a transaction ends behind the SDK's back. Some errors do what the first does.
const ENDS: [&str; 2] = ["INSERT OR ROLLBACK INTO shop (id) VALUES (1)", "ROLLBACK"];

/// What a business does then, which has swallowed the error.
const GOES_ON: [&str; 5] = [
    "INSERT INTO orders (id) VALUES (43)",
    "BEGIN; INSERT INTO orders (id) VALUES (43); COMMIT",
    "BEGIN IMMEDIATE; INSERT INTO orders (id) VALUES (43)",
    "SAVEPOINT s; INSERT INTO orders (id) VALUES (43); RELEASE s",
    "SELECT 1",
];

/// Errors are swallowed.
async fn run(db: &mut SqliteConnection, sql: &'static str) {
    drop(sqlx::raw_sql(sql).execute(db).await);
}

/// A pool with one connection.
async fn narrow(world: &World) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(PATIENCE)
        .connect_with(options(&world.folder, "orders.db"))
        .await
        .unwrap()
}

#[tokio::test]
async fn nothing_stays_of_what_a_business_writes_after_its_transaction_was_ended() {
    for end in ENDS {
        for goes_on in GOES_ON {
            let world = World::new().await;
            let failed = world
                .producer
                .transact(&world.pool, message(), async |tx| {
                    sqlx::raw_sql("INSERT INTO shop (id) VALUES (1)")
                        .execute(&mut **tx)
                        .await?;
                    buy(tx, 42).await?;
                    run(tx, end).await;
                    run(tx, goes_on).await;
                    if let Ok(mut inner) = tx.begin().await {
                        drop(buy(&mut inner, 44).await);
                        drop(inner.commit().await);
                    }
                    Ok::<_, sqlx::Error>(())
                })
                .await
                .unwrap_err();
            assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
            world.producer.drain().await;
            assert_eq!(world.orders().await, 0, "{end}; {goes_on}");
            assert_eq!(world.service.states(), [MessageState::Cancelled]);
            let id = world.service.state().prepared[0];
            assert_eq!(world.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
        }
    }
}

#[tokio::test]
async fn a_write_after_the_end_of_the_transaction_is_an_error() {
    for end in ENDS {
        let world = World::new().await;
        let failed = world
            .producer
            .transact(&world.pool, message(), async |tx| {
                sqlx::raw_sql("INSERT INTO shop (id) VALUES (1)")
                    .execute(&mut **tx)
                    .await?;
                run(tx, end).await;
                buy(tx, 43).await
            })
            .await
            .unwrap_err();
        assert!(matches!(failed, TransactError::Business(_)), "{failed}");
        world.producer.drain().await;
        assert_eq!(world.orders().await, 0);
        assert_eq!(world.service.states(), [MessageState::Cancelled]);
    }
}

#[tokio::test]
async fn whatever_became_of_a_business_its_connection_commits_for_others() {
    let world = World::new().await;
    let pool = narrow(&world).await;
    let (producer, pool) = (&world.producer, &pool);
    for (turn, end) in ["commits", "fails", "is dropped", "ended", "refused"]
        .into_iter()
        .enumerate()
    {
        let reached = Notify::new();
        let business = producer.transact(pool, message(), async |tx| {
            match end {
                "fails" => return Err(sqlx::Error::RowNotFound),
                "is dropped" => {
                    reached.notify_one();
                    std::future::pending::<()>().await;
                }
                "ended" => run(tx, "ROLLBACK").await,
                // No such shop: the constraint is looked at by COMMIT.
                "refused" => run(tx, "INSERT INTO deferred (shop) VALUES (7)").await,
                _ => {}
            }
            Ok(())
        });
        let ended = tokio::select! {
            ended = business => Some(ended),
            () = reached.notified() => None,
        };
        let committed = matches!(ended, Some(Ok(Outcome::Committed(()))));
        assert_eq!(committed, end == "commits", "{end}: {ended:?}");
        // With a transaction, and without.
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        buy(&mut tx, 1).await.unwrap();
        tx.commit().await.unwrap();
        buy(&mut pool.acquire().await.unwrap(), 2).await.unwrap();
        let orders = 2 * (turn as i64 + 1);
        assert_eq!(world.orders().await, orders, "{end}");
    }
}

#[tokio::test]
async fn a_connection_that_others_have_left_inside_a_transaction_is_not_used() {
    let world = World::new().await;
    let pool = narrow(&world).await;
    let mut tx = pool.begin().await.unwrap();
    run(&mut tx, "ROLLBACK").await;
    // From here on sqlx counts a transaction that there is not.
    assert!(tx.rollback().await.is_err());
    let bought = world
        .producer
        .transact(&pool, message(), async |tx| buy(tx, 42).await)
        .await;
    assert_eq!(bought.unwrap(), Outcome::Committed(42));
    assert_eq!(world.orders().await, 1);
}
