//! Opens the database that the options name, with points's tables in it.

pub(crate) mod postgres;
pub(crate) mod sqlite;

use std::path::PathBuf;

use sqlx::postgres::PgConnectOptions;
use sqlx::{PgPool, SqlitePool};
use tokio_util::sync::CancellationToken;

use crate::Error;

/// An open database.
pub(crate) enum Database {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Database {
    /// Opens `postgres://…`, or else the SQLite file of that name. A server that is not there
    /// is waited for; nothing is opened if the shutdown comes first.
    pub(crate) async fn open(
        named: &str,
        shutdown: &CancellationToken,
    ) -> Result<Option<Self>, Error> {
        if named.starts_with("postgres://") || named.starts_with("postgresql://") {
            // What the parser says may repeat the password.
            let options: PgConnectOptions = named.parse().map_err(|_| Error::Address)?;
            let pool = postgres::open(options, shutdown).await?;
            return Ok(pool.map(Self::Postgres));
        }
        let path = named.strip_prefix("sqlite:").unwrap_or(named);
        let pool = sqlite::open(&PathBuf::from(path)).await?;
        Ok(Some(Self::Sqlite(pool)))
    }
}
