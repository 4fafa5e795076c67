//! What differs between the databases that the tests run on.

use std::time::Duration;

use handfast_consumer::{GuardConnection, InboxDatabase, Tx};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Pool, Postgres, Sqlite, Transaction};
use tempfile::TempDir;
use uuid::Uuid;

use handfast_scratch::Scratch;

/// A database with the table `effect`, which is real and this test's own.
pub(crate) trait Database: InboxDatabase<Connection: GuardConnection> {
    /// What keeps it there.
    type Home: Send + Sync;

    async fn home() -> Self::Home;

    async fn open(home: &Self::Home) -> Pool<Self>;

    /// Makes `effect`.
    const SCHEMA: &'static str;

    fn run(tx: &mut Tx<Self>, sql: String) -> impl Future<Output = ()> + Send;

    fn insert_effect(
        tx: &mut Tx<Self>,
        id: Uuid,
        word: &str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    async fn insert_uuid(tx: &mut Tx<Self>, sql: &'static str, id: Uuid);

    async fn count(pool: &Pool<Self>, sql: &'static str) -> i64;

    async fn count_of(pool: &Pool<Self>, sql: &'static str, id: Uuid) -> i64;

    async fn text(pool: &Pool<Self>, sql: &'static str) -> String;

    /// Keeps the inbox from taking messages 1, 2 and 3.
    async fn hold(pool: &Pool<Self>) -> Transaction<'static, Self>;
}

impl Database for Sqlite {
    type Home = TempDir;

    async fn home() -> TempDir {
        TempDir::new().unwrap()
    }

    async fn open(home: &TempDir) -> Pool<Self> {
        let file = SqliteConnectOptions::new()
            .filename(home.path().join("consumer.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(5));
        SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(file)
            .await
            .unwrap()
    }

    const SCHEMA: &'static str =
        "CREATE TABLE effect (one INTEGER PRIMARY KEY, message_id BLOB NOT NULL, word TEXT)";

    async fn run(tx: &mut Tx<Self>, sql: String) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(tx).await.unwrap();
    }

    async fn insert_effect(tx: &mut Tx<Self>, id: Uuid, word: &str) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO effect (message_id, word) VALUES (?, ?)")
            .bind(id)
            .bind(word.to_owned())
            .execute(tx)
            .await?;
        Ok(())
    }

    async fn insert_uuid(tx: &mut Tx<Self>, sql: &'static str, id: Uuid) {
        sqlx::query(sql).bind(id).execute(tx).await.unwrap();
    }

    async fn count(pool: &Pool<Self>, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }

    async fn count_of(pool: &Pool<Self>, sql: &'static str, id: Uuid) -> i64 {
        let query = sqlx::query_scalar(sql).bind(id);
        query.fetch_one(pool).await.unwrap()
    }

    async fn text(pool: &Pool<Self>, sql: &'static str) -> String {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }

    async fn hold(pool: &Pool<Self>) -> Transaction<'static, Self> {
        let mut lock = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        Self::run(&mut lock, "DELETE FROM effect".to_owned()).await;
        lock
    }
}

impl Database for Postgres {
    type Home = Scratch;

    async fn home() -> Scratch {
        Scratch::create().await
    }

    async fn open(home: &Scratch) -> Pool<Self> {
        PgPoolOptions::new()
            .max_connections(6)
            .connect_with(home.options())
            .await
            .unwrap()
    }

    const SCHEMA: &'static str = "CREATE TABLE effect (
        one bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, message_id uuid NOT NULL, word text)";

    async fn run(tx: &mut Tx<Self>, sql: String) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(tx).await.unwrap();
    }

    async fn insert_effect(tx: &mut Tx<Self>, id: Uuid, word: &str) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO effect (message_id, word) VALUES ($1, $2)")
            .bind(id)
            .bind(word.to_owned())
            .execute(tx)
            .await?;
        Ok(())
    }

    async fn insert_uuid(tx: &mut Tx<Self>, sql: &'static str, id: Uuid) {
        sqlx::query(sql).bind(id).execute(tx).await.unwrap();
    }

    async fn count(pool: &Pool<Self>, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }

    async fn count_of(pool: &Pool<Self>, sql: &'static str, id: Uuid) -> i64 {
        let query = sqlx::query_scalar(sql).bind(id);
        query.fetch_one(pool).await.unwrap()
    }

    async fn text(pool: &Pool<Self>, sql: &'static str) -> String {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }

    async fn hold(pool: &Pool<Self>) -> Transaction<'static, Self> {
        let mut lock = pool.begin().await.unwrap();
        let rows = "INSERT INTO handfast_inbox (subscription, message_id)
                    SELECT 'accounting', lpad(n::text, 32, '0')::uuid
                      FROM generate_series(1, 3) AS n";
        Self::run(&mut lock, rows.to_owned()).await;
        lock
    }
}

/// Makes a test of each of these functions for each database.
macro_rules! on_every_database {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name::<sqlx::Sqlite>().await })*
        }

        mod postgres {
            $(#[tokio::test] async fn $name() { super::$name::<sqlx::Postgres>().await })*
        }
    };
}

pub(crate) use on_every_database;
