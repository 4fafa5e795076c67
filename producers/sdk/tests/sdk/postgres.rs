//! The same on PostgreSQL, where transactions overlap.

mod checks;
mod dropped;
mod hung;
mod links;
mod proxy;
mod schema;
mod transact;

use std::time::Duration;

use handfast_producer::{FenceDatabase as _, Message, Producer, migrate};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions, Postgres};
use sqlx::{AssertSqlSafe, ConnectOptions as _, PgPool};
use uuid::Uuid;

use crate::scripted::{PATIENCE, Scripted};
use handfast_scratch::Scratch;

/// What a database's default may be.
const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

/// A database with a fence and a table of orders, and a producer on it.
struct Shop {
    service: Scripted,
    producer: Producer,
    pool: PgPool,
    scratch: Scratch,
}

impl Shop {
    async fn new() -> Self {
        Self::at(LEVELS[0]).await
    }

    /// With this isolation level as the database's default.
    async fn at(level: &str) -> Self {
        let scratch = Scratch::create().await;
        let service = Scripted::start().await;
        let producer = Producer::connect(&service.url, "orders").await.unwrap();
        let pool = pool(scratch.options(), 4);
        let name = scratch.options().get_database().unwrap().to_owned();
        sqlx::raw_sql(AssertSqlSafe(format!(
            "ALTER DATABASE {name} SET default_transaction_isolation = '{level}'"
        )))
        .execute(&pool)
        .await
        .unwrap();
        // Defaults are read when a connection is made.
        pool.close().await;
        let pool = self::pool(scratch.options(), 4);
        migrate(&pool).await.unwrap();
        sqlx::raw_sql(
            "CREATE TABLE orders (id bigint NOT NULL);
             CREATE TABLE shop (id bigint NOT NULL PRIMARY KEY);
             CREATE TABLE deferred (
                 shop bigint NOT NULL REFERENCES shop (id) DEFERRABLE INITIALLY DEFERRED
             );",
        )
        .execute(&pool)
        .await
        .unwrap();
        Self {
            service,
            producer,
            pool,
            scratch,
        }
    }

    async fn orders(&self) -> i64 {
        self.count("SELECT count(*) FROM orders").await
    }

    async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    async fn verdict(&self, id: Uuid) -> Option<String> {
        sqlx::query_scalar("SELECT verdict FROM handfast_fence WHERE message_id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await
            .unwrap()
    }

    /// A connection beside the pool.
    async fn connection(&self) -> PgConnection {
        self.scratch.options().connect().await.unwrap()
    }

    /// Waits until a query about this database answers true.
    async fn until(&self, what: &str, sql: &'static str) {
        let mut watcher = self.connection().await;
        let wait = async {
            loop {
                let holds: bool = sqlx::query_scalar(sql)
                    .fetch_one(&mut watcher)
                    .await
                    .unwrap();
                if holds {
                    return;
                }
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("not in time: {what}");
        }
    }

    /// Waits until somebody waits for another's transaction.
    async fn until_somebody_waits(&self) {
        self.until(
            "somebody who waits for a lock",
            "SELECT EXISTS (SELECT FROM pg_stat_activity
              WHERE datname = current_database() AND wait_event_type = 'Lock')",
        )
        .await;
    }
}

fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(PATIENCE)
        .connect_lazy_with(options)
}

fn message() -> Message {
    Message::new("order.paid").payload("text/plain", "42")
}

/// The business of these tests.
async fn buy(db: &mut PgConnection, order: i64) -> Result<i64, sqlx::Error> {
    sqlx::query("INSERT INTO orders (id) VALUES ($1)")
        .bind(order)
        .execute(db)
        .await?;
    Ok(order)
}

#[tokio::test]
async fn pruning_removes_what_is_old_and_nothing_else() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        sqlx::raw_sql(
            "INSERT INTO handfast_fence (message_id, verdict, at)
             SELECT gen_random_uuid(), 'COMMITTED', 'epoch'::timestamptz + i * interval '1 hour'
               FROM generate_series(1, 2500) AS i",
        )
        .execute(&shop.pool)
        .await
        .unwrap();
        let fence = handfast_producer::Fence::open(&shop.pool).await.unwrap();
        let young = Uuid::now_v7();
        fence.settle(young).await.unwrap();
        let removed = fence.prune(Duration::from_secs(60)).await.unwrap();
        assert_eq!(removed, 2_500);
        assert!(shop.verdict(young).await.is_some());
    }
}

#[tokio::test]
async fn microseconds_since_1970_are_the_databases_clock() {
    let shop = Shop::new().await;
    let before = shop
        .count("SELECT (extract(epoch FROM now()) * 1e6)::bigint")
        .await;
    let now = Postgres::now_us(&shop.pool).await.unwrap();
    let after = shop
        .count("SELECT (extract(epoch FROM now()) * 1e6)::bigint")
        .await;
    assert!(before <= now && now <= after, "{before} {now} {after}");
}
