//! A database on a PostgreSQL server. It must exist; the tables are made.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// Applied once.
pub(crate) const SCHEMA: &str = include_str!("../schema/postgres.sql");

/// Four for transactions, one for pruning, and one that may still be closing.
const CONNECTIONS: u32 = 6;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
const NEXT_TRY: Duration = Duration::from_secs(1);

/// Opens it, or waits until it can be opened. None if the shutdown comes first.
pub(crate) async fn open(
    options: PgConnectOptions,
    shutdown: &CancellationToken,
) -> Result<Option<PgPool>, Error> {
    let database = format!(
        "{} at {}:{}",
        options.get_database().unwrap_or_default(),
        options.get_host(),
        options.get_port()
    );
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_lazy_with(options);
    let mut said = false;
    loop {
        // In a task of its own, so that a shutdown leaves no connection inside a transaction.
        let preparing = tokio::spawn(prepare(pool.clone()));
        let prepared = tokio::select! {
            prepared = preparing => prepared,
            () = shutdown.cancelled() => return Ok(None),
        };
        match prepared {
            Ok(Ok(())) => return Ok(Some(pool)),
            Ok(Err(source)) if !may_heal(&source) => {
                return Err(Error::Database {
                    doing: "prepare",
                    database,
                    source,
                });
            }
            Ok(Err(error)) if !said => {
                tracing::warn!(database, %error, "waiting for the database");
                said = true;
            }
            Ok(Err(_)) | Err(_) => {}
        }
        tokio::select! {
            () = sleep(NEXT_TRY) => {}
            () = shutdown.cancelled() => return Ok(None),
        }
    }
}

async fn prepare(pool: PgPool) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    // Two processes may start at once: the second waits here and finds the tables.
    sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('accounting', 0))")
        .execute(&mut *tx)
        .await?;
    let exists: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'voucher' AND pg_table_is_visible(oid))",
    )
    .fetch_one(&mut *tx)
    .await?;
    if !exists {
        sqlx::raw_sql(SCHEMA).execute(&mut *tx).await?;
    }
    tx.commit().await
}

/// A statement that the server cannot or must not run is refused every time.
fn may_heal(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    !code.is_some_and(|code| code.starts_with("42"))
}
