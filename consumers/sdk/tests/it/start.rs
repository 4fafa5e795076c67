//! What a start refuses, because waiting would not heal it.

use std::time::Duration;

use handfast_consumer::{Consumer, Error, handfast};
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use tokio_util::sync::CancellationToken;

use crate::common::World;

async fn start(world: &World<Sqlite>, pool: SqlitePool) -> Error {
    Consumer::connect(handfast(world.service.address()))
        .await
        .unwrap()
        .subscription("payment.completed", "accounting")
        .inbox(pool)
        .run_batch(world.obedient(), CancellationToken::new())
        .await
        .unwrap_err()
}

#[tokio::test]
async fn a_database_that_is_not_durable_is_refused() {
    let world = World::<Sqlite>::new().await;
    let dir = tempfile::TempDir::new().unwrap();
    let file = SqliteConnectOptions::new()
        .filename(dir.path().join("inbox.db"))
        .create_if_missing(true)
        .synchronous(SqliteSynchronous::Normal);
    let pool = SqlitePool::connect_with(file).await.unwrap();
    assert_eq!(
        start(&world, pool).await.to_string(),
        "the inbox's database is not durable: synchronous is NORMAL; set it to FULL"
    );

    let memory = SqlitePoolOptions::new().max_connections(1);
    let pool = memory.connect("sqlite::memory:").await.unwrap();
    assert_eq!(
        start(&world, pool).await.to_string(),
        "the inbox's database is not durable: journal_mode is MEMORY; set it to WAL"
    );
}

#[tokio::test]
async fn a_schema_newer_than_the_program_is_refused() {
    let world = World::<Sqlite>::new().await;
    sqlx::query("INSERT INTO handfast_inbox_version (version, name) VALUES (99, 'later')")
        .execute(&world.pool)
        .await
        .unwrap();
    let error = start(&world, world.pool.clone()).await;
    assert!(matches!(error, Error::Schema(_)), "{error}");
    assert!(error.to_string().contains("version 99"), "{error}");
}

#[tokio::test]
async fn an_address_that_cannot_be_read_is_refused() {
    for address in [
        "",
        "127.0.0.1:7400",
        "https://127.0.0.1:7400",
        "amqp://localhost",
        "http://",
    ] {
        let error = Consumer::connect(handfast(address)).await.err().unwrap();
        assert!(matches!(error, Error::Address { .. }), "{address}: {error}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[tokio::test]
async fn options_out_of_range_are_refused() {
    let world = World::<Sqlite>::new().await;
    let subscribers = [
        world.subscriber().await.prefetch(0),
        world.subscriber().await.prefetch(10_001),
        world.subscriber().await.max_batch(0),
        world.subscriber().await.concurrency(0),
        world.subscriber().await.handler_timeout(Duration::ZERO),
        world.subscriber().await.retention(Duration::from_secs(1)),
        world.subscriber().await.name("x".repeat(101)),
    ];
    for subscriber in subscribers {
        let run = subscriber.run_batch(world.obedient(), CancellationToken::new());
        assert!(matches!(run.await, Err(Error::Option { .. })));
    }
}
