//! What the tests need of each kind of database.

use std::future::Future;

use handfast_producer::FenceDatabase;
use payment::Database;
use payment::store::{Records, Store};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool, Pool, Postgres, Sqlite, SqlitePool};
use tempfile::TempDir;

use handfast_scratch::Scratch;

pub(crate) trait Kind: FenceDatabase {
    /// What keeps the database there.
    type Home: Send + Sync;
    type Store: Records<Database = Self>;

    fn home() -> impl Future<Output = Self::Home> + Send;
    fn database(home: &Self::Home) -> Database;
    /// A database that cannot be opened.
    fn nowhere(home: &Self::Home) -> Database;
    fn store(home: &Self::Home) -> impl Future<Output = Self::Store> + Send;
    /// A pool beside the service's.
    fn pool(home: &Self::Home) -> Pool<Self>;
    fn run(pool: &Pool<Self>, sql: String) -> impl Future<Output = ()> + Send;
    fn number(pool: &Pool<Self>, sql: &'static str) -> impl Future<Output = i64> + Send;
}

impl Kind for Sqlite {
    type Home = TempDir;
    type Store = Store<Self>;

    async fn home() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    fn database(home: &TempDir) -> Database {
        Database::File(home.path().join("payment.db"))
    }

    fn nowhere(_: &TempDir) -> Database {
        Database::File("/nowhere/at/all/payment.db".into())
    }

    async fn store(home: &TempDir) -> Store<Self> {
        let path = home.path().join("payment.db");
        Store::<Self>::open(&path).await.unwrap()
    }

    fn pool(home: &TempDir) -> SqlitePool {
        let path = home.path().join("payment.db");
        SqlitePool::connect_lazy_with(sqlx::sqlite::SqliteConnectOptions::new().filename(path))
    }

    async fn run(pool: &SqlitePool, sql: String) {
        let sql = AssertSqlSafe(sql);
        sqlx::raw_sql(sql).execute(pool).await.unwrap();
    }

    async fn number(pool: &SqlitePool, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }
}

impl Kind for Postgres {
    type Home = Scratch;
    type Store = Store<Self>;

    async fn home() -> Scratch {
        Scratch::create().await
    }

    fn database(home: &Scratch) -> Database {
        Database::Server(Box::new(home.options()))
    }

    fn nowhere(home: &Scratch) -> Database {
        Database::Server(Box::new(home.options().database("nowhere_at_all")))
    }

    async fn store(home: &Scratch) -> Store<Self> {
        Store::<Self>::open(&home.options()).await.unwrap()
    }

    fn pool(home: &Scratch) -> PgPool {
        PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy_with(home.options())
    }

    async fn run(pool: &PgPool, sql: String) {
        let sql = AssertSqlSafe(sql);
        sqlx::raw_sql(sql).execute(pool).await.unwrap();
    }

    async fn number(pool: &PgPool, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
    }
}

/// Makes a test per kind of database of each function.
macro_rules! on_every_database {
    ($($test:ident,)*) => {
        mod on_sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test::<sqlx::Sqlite>().await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test]
            async fn $test() {
                super::$test::<sqlx::Postgres>().await;
            })*
        }
    };
}

pub(crate) use on_every_database;
