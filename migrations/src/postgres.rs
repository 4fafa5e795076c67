//! The runner on PostgreSQL.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use crate::{Database, Owner, SchemaConnection};

/// READ COMMITTED whatever the default is: the statement behind the lock has to see what was
/// committed by whoever held it.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// How long one process waits for another that is migrating.
const WAIT_FOR_TURN: &str = "SET LOCAL lock_timeout = '30s'";

/// How long a step waits for a table. While it waits, everybody who comes later waits behind it.
const WAIT_FOR_TABLE: &str = "SET LOCAL lock_timeout = '1s'";

impl SchemaConnection for PgConnection {
    const DATABASE: Database = Database::Postgres;

    async fn version(&mut self, owner: Owner) -> Result<i64, sqlx::Error> {
        // Not `to_regclass`: it may answer from a cache that knows nothing of what another has
        // committed while this transaction waited for its turn.
        let exists: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_class WHERE relname = $1 AND pg_table_is_visible(oid))",
        )
        .bind(owner.version_table())
        .fetch_one(&mut *self)
        .await?;
        if !exists {
            return Ok(0);
        }
        sqlx::query_scalar(AssertSqlSafe(owner.read_version()))
            .fetch_one(self)
            .await
    }

    async fn migrate(&mut self, owner: Owner) -> Result<usize, sqlx::Error> {
        let mut tx = self.begin_with(BEGIN).await?;
        sqlx::raw_sql(WAIT_FOR_TURN).execute(&mut *tx).await?;
        // Two processes may start at once: the second waits here and then reads what the first
        // has done.
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
            .bind(owner.version_table())
            .execute(&mut *tx)
            .await?;
        sqlx::raw_sql(WAIT_FOR_TABLE).execute(&mut *tx).await?;
        let missing = owner.missing(Self::DATABASE, tx.version(owner).await?);
        for sql in missing.script {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        Ok(missing.steps)
    }
}
