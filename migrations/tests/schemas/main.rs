//! Every schema, on every kind of database it is written for.

#![expect(clippy::unwrap_used, reason = "tests may fail loudly")]

use handfast_migrations::{Database, Error, Owner, SchemaConnection};
use handfast_scratch::Scratch;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tokio::task::JoinSet;

async fn memory() -> SqliteConnection {
    SqliteConnection::connect("sqlite::memory:").await.unwrap()
}

async fn postgres(scratch: &Scratch) -> PgConnection {
    scratch.options().connect().await.unwrap()
}

async fn apply_twice<C: SchemaConnection>(db: &mut C) {
    for owner in Owner::ALL {
        let steps = owner.steps(C::DATABASE).len();
        assert_eq!(owner.apply(db).await.unwrap(), steps);
        assert_eq!(owner.apply(db).await.unwrap(), 0);
        let version = owner.version(db).await.unwrap();
        assert_eq!(version, owner.latest(C::DATABASE));
    }
}

#[tokio::test]
async fn applying_twice_changes_nothing() {
    apply_twice(&mut memory().await).await;
    let scratch = Scratch::create().await;
    apply_twice(&mut postgres(&scratch).await).await;
}

#[tokio::test]
async fn what_is_printed_can_be_applied_by_hand() {
    let scratch = Scratch::create().await;
    let mut server = postgres(&scratch).await;
    let mut sqlite = memory().await;
    for owner in Owner::ALL {
        sqlx::raw_sql(AssertSqlSafe(owner.print(Database::Sqlite)))
            .execute(&mut sqlite)
            .await
            .unwrap();
        assert_eq!(owner.apply(&mut sqlite).await.unwrap(), 0, "{owner:?}");
        sqlx::raw_sql(AssertSqlSafe(owner.print(Database::Postgres)))
            .execute(&mut server)
            .await
            .unwrap();
        assert_eq!(owner.apply(&mut server).await.unwrap(), 0, "{owner:?}");
    }
}

async fn refuse_newer<C: SchemaConnection>(db: &mut C) {
    let error = Owner::Fence.apply(db).await.unwrap_err();
    assert!(matches!(error, Error::Newer { found: 99, .. }), "{error}");
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let later = "INSERT INTO handfast_fence_version (version, name) VALUES (99, 'later')";
    let mut sqlite = memory().await;
    Owner::Fence.apply(&mut sqlite).await.unwrap();
    sqlx::raw_sql(later).execute(&mut sqlite).await.unwrap();
    refuse_newer(&mut sqlite).await;
    let scratch = Scratch::create().await;
    let mut server = postgres(&scratch).await;
    Owner::Fence.apply(&mut server).await.unwrap();
    sqlx::raw_sql(later).execute(&mut server).await.unwrap();
    refuse_newer(&mut server).await;
}

#[tokio::test]
async fn processes_that_start_at_once_take_turns() {
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let scratch = Scratch::create().await;
        let options = scratch
            .options()
            .options([("default_transaction_isolation", isolation)]);
        let mut starts = JoinSet::new();
        for _ in 0..8 {
            let options = options.clone();
            starts.spawn(async move {
                let mut db = options.connect().await.unwrap();
                Owner::Fence.apply(&mut db).await.unwrap()
            });
        }
        let applied: usize = starts.join_all().await.into_iter().sum();
        assert_eq!(applied, 1, "{isolation}");
    }
}

#[tokio::test]
async fn each_database_has_an_identity_of_its_own() {
    let mut identities = Vec::new();
    for _ in 0..2 {
        let scratch = Scratch::create().await;
        let mut db = postgres(&scratch).await;
        Owner::Fence.apply(&mut db).await.unwrap();
        let identity: uuid::Uuid =
            sqlx::query_scalar("SELECT identity FROM handfast_fence_identity")
                .fetch_one(&mut db)
                .await
                .unwrap();
        identities.push(identity);
    }
    assert_ne!(identities[0], identities[1]);
}
