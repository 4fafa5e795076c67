//! A producer's side: a database file with a fence and a table of orders.

use std::time::Duration;

use handfast_producer::{Message, Producer, migrate};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{SqliteConnection, SqlitePool};
use tempfile::TempDir;
use uuid::Uuid;

use crate::scripted::Scripted;

pub(crate) struct World {
    pub(crate) service: Scripted,
    pub(crate) producer: Producer,
    pub(crate) pool: SqlitePool,
    pub(crate) folder: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let service = Scripted::start().await;
        let producer = Producer::connect(&service.url, "orders").await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let pool = open(&folder, "orders.db").await;
        Self {
            service,
            producer,
            pool,
            folder,
        }
    }

    pub(crate) async fn orders(&self) -> i64 {
        count(&self.pool, "SELECT count(*) FROM orders").await
    }

    pub(crate) async fn verdict(&self, id: Uuid) -> Option<String> {
        sqlx::query_scalar("SELECT verdict FROM handfast_fence WHERE message_id = ?")
            .bind(&id.as_bytes()[..])
            .fetch_optional(&self.pool)
            .await
            .unwrap()
    }
}

pub(crate) fn options(folder: &TempDir, name: &str) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(folder.path().join(name))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
}

pub(crate) async fn open(folder: &TempDir, name: &str) -> SqlitePool {
    let pool = SqlitePoolOptions::new()
        .max_connections(4)
        .connect_with(options(folder, name))
        .await
        .unwrap();
    migrate(&pool).await.unwrap();
    sqlx::raw_sql(
        "CREATE TABLE orders (id INTEGER NOT NULL);
         CREATE TABLE shop (id INTEGER NOT NULL PRIMARY KEY);
         CREATE TABLE deferred (
             shop INTEGER NOT NULL REFERENCES shop (id) DEFERRABLE INITIALLY DEFERRED
         );",
    )
    .execute(&pool)
    .await
    .unwrap();
    pool
}

pub(crate) async fn count(pool: &SqlitePool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

pub(crate) fn message() -> Message {
    Message::new("order.paid").payload("text/plain", "42")
}

/// The business of these tests.
pub(crate) async fn buy(db: &mut SqliteConnection, order: i64) -> Result<i64, sqlx::Error> {
    sqlx::query("INSERT INTO orders (id) VALUES (?)")
        .bind(order)
        .execute(db)
        .await?;
    Ok(order)
}
