//! PostgreSQL lets transactions write side by side, so one pool serves everybody.

use sqlx::Postgres;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

use super::{ACQUIRE_TIMEOUT, Store};
use crate::database::Database;
use crate::run::Error;

const CONNECTIONS: u32 = 8;

/// Opens the database, which must exist, making its tables if they do not.
pub async fn open_database(options: &PgConnectOptions) -> Result<PgPool, Error> {
    let failed = |source| Error::Database {
        database: Database::Server(Box::new(options.clone())),
        source,
    };
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_with(options.clone())
        .await
        .map_err(failed)?;
    handfast_producer::migrate(&pool).await?;
    // One text of several statements is one transaction.
    sqlx::raw_sql(include_str!("../../migrations/postgres/0001_payment.sql"))
        .execute(&pool)
        .await
        .map_err(failed)?;
    Ok(pool)
}

impl Store<Postgres> {
    /// Opens the database; see [`open_database`].
    pub async fn open(options: &PgConnectOptions) -> Result<Self, Error> {
        let pool = open_database(options).await?;
        Ok(Self {
            readers: pool.clone(),
            writer: pool,
        })
    }
}

/// True if the database is only not there yet: the server is away, starting, or full.
pub(crate) fn may_pass(error: &sqlx::Error) -> bool {
    const CANNOT_CONNECT_NOW: &str = "57P03";
    const TOO_MANY_CONNECTIONS: &str = "53300";
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| code == CANNOT_CONNECT_NOW || code == TOO_MANY_CONNECTIONS),
        _ => false,
    }
}
