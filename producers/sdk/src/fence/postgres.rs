//! The fence in PostgreSQL.
//!
//! The business transaction keeps the isolation level of its pool. A check's is READ COMMITTED,
//! whatever the default is: at a higher level it would read as of before it waited. It holds
//! the lock of one row at most and waits for one at most, so it can never be part of a deadlock.

use handfast_migrations::Owner;
use sqlx::postgres::{PgConnectOptions, PgConnection, Postgres};
use sqlx::{Connection as _, PgPool};
use uuid::Uuid;

use super::{FenceDatabase, FenceError, FenceIdentity, FenceVerdict, read, verdict};

const UNDEFINED_TABLE: &str = "42P01";
const LOCK_NOT_AVAILABLE: &str = "55P03";
const SERIALIZATION_FAILURE: &str = "40001";
const DEADLOCK_DETECTED: &str = "40P01";

impl FenceDatabase for Postgres {
    // SET takes no snapshot: under REPEATABLE READ the fence row is still the first statement.
    const BEGIN: &'static str = "BEGIN; SET LOCAL synchronous_commit = on";

    // The wait is far below `deadlock_timeout`, after which others would begin to be chosen.
    const BEGIN_CHECK: &'static str = "BEGIN ISOLATION LEVEL READ COMMITTED; \
         SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '200ms'";

    async fn migrate(pool: &PgPool) -> Result<(), FenceError> {
        let mut connection = pool.acquire().await.map_err(read)?;
        Owner::Fence.apply(&mut *connection).await?;
        Ok(())
    }

    async fn identity(pool: &PgPool) -> Result<FenceIdentity, FenceError> {
        let mut connection = pool.acquire().await.map_err(read)?;
        let settings: (String, String) =
            sqlx::query_as("SELECT current_setting('fsync'), current_setting('full_page_writes')")
                .fetch_one(&mut *connection)
                .await
                .map_err(read)?;
        refuse_if_not_durable(&settings.0, &settings.1)?;
        let identity: Uuid =
            sqlx::query_scalar("SELECT identity FROM handfast_fence_identity WHERE one = 1")
                .fetch_one(&mut *connection)
                .await
                .map_err(|source| {
                    let missing = matches!(source, sqlx::Error::RowNotFound)
                        || code(&source).as_deref() == Some(UNDEFINED_TABLE);
                    if missing {
                        FenceError::Missing { source }
                    } else {
                        read(source)
                    }
                })?;
        Ok(FenceIdentity::from_bytes(identity.into_bytes()))
    }

    fn check_options(pool: &PgPool) -> PgConnectOptions {
        (*pool.connect_options()).clone()
    }

    async fn hold(_: &mut PgConnection) -> Result<(), sqlx::Error> {
        // After an error PostgreSQL refuses every statement until the transaction is ended.
        Ok(())
    }

    async fn release(_: &mut PgConnection) -> Result<(), sqlx::Error> {
        Ok(())
    }

    async fn has_ended(_: &mut PgConnection, _: Uuid) -> Result<bool, sqlx::Error> {
        // It may have, by a statement of the business; a rollback is no error even then.
        Ok(false)
    }

    async fn may_commit(connection: &mut PgConnection, _: Uuid) -> Result<bool, sqlx::Error> {
        // The fence row has made an id for the transaction. The table is not asked: under
        // SERIALIZABLE, businesses that read it would refuse each other.
        sqlx::query_scalar("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
            .fetch_one(connection)
            .await
    }

    async fn insert(
        connection: &mut PgConnection,
        id: Uuid,
        verdict: FenceVerdict,
    ) -> Result<bool, sqlx::Error> {
        let done = sqlx::query(
            "INSERT INTO handfast_fence (message_id, verdict)
             VALUES ($1, $2)
             ON CONFLICT (message_id) DO NOTHING",
        )
        .bind(id)
        .bind(verdict.name())
        .execute(connection)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn read(
        connection: &mut PgConnection,
        id: Uuid,
    ) -> Result<Option<FenceVerdict>, sqlx::Error> {
        let found: Option<String> =
            sqlx::query_scalar("SELECT verdict FROM handfast_fence WHERE message_id = $1")
                .bind(id)
                .fetch_optional(connection)
                .await?;
        found.as_deref().map(verdict).transpose()
    }

    fn is_busy(error: &sqlx::Error) -> bool {
        code(error).is_some_and(|code| {
            [LOCK_NOT_AVAILABLE, SERIALIZATION_FAILURE, DEADLOCK_DETECTED].contains(&code.as_str())
        })
    }

    async fn now_us(pool: &PgPool) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            .fetch_one(pool)
            .await
    }

    async fn prune(pool: &PgPool, before_us: i64, rows: u32) -> Result<u64, sqlx::Error> {
        let mut connection = pool.acquire().await?;
        let mut tx = connection.begin_with(Self::BEGIN_CHECK).await?;
        // Another process that prunes, too, is not waited for.
        let done = sqlx::query(
            "DELETE FROM handfast_fence WHERE message_id = ANY (ARRAY(
                 SELECT message_id FROM handfast_fence
                  WHERE at < 'epoch'::timestamptz + $1 * interval '1 microsecond'
                  ORDER BY at LIMIT $2
                    FOR UPDATE SKIP LOCKED))",
        )
        .bind(before_us)
        .bind(i64::from(rows))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected())
    }
}

/// Both are settings of the server, not of a connection.
fn refuse_if_not_durable(fsync: &str, full_page_writes: &str) -> Result<(), FenceError> {
    for (name, value) in [("fsync", fsync), ("full_page_writes", full_page_writes)] {
        if value != "on" {
            return Err(FenceError::NotDurable {
                setting: format!("`{name}` is {value}"),
                remedy: "set it to on in postgresql.conf",
            });
        }
    }
    Ok(())
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_forgets_at_a_power_cut_is_refused() {
        assert!(refuse_if_not_durable("on", "on").is_ok());
        for (fsync, full_page_writes) in [("off", "on"), ("on", "off")] {
            let refused = refuse_if_not_durable(fsync, full_page_writes);
            assert!(matches!(refused, Err(FenceError::NotDurable { .. })));
        }
    }
}
