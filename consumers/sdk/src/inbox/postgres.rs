//! The inbox in PostgreSQL.

use std::time::Duration;

use handfast_migrations::Owner;
use sqlx::Connection as _;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnection, Postgres};
use uuid::Uuid;

use super::{InboxDatabase, Seal, Seen};
use crate::error::Error;

/// A statement came after one that failed, and nothing of the transaction can be committed.
const IN_FAILED_SQL_TRANSACTION: &str = "25P02";
/// Classes of errors that are about the data: not storable, against a constraint, raised by a
/// trigger. A deferred constraint or trigger brings them at the commit.
const ABOUT_DATA: [&str; 3] = ["22", "23", "P0"];

impl InboxDatabase for Postgres {
    // Enough to work while another commits; more of them would only wait for the same disk.
    const CONCURRENCY: usize = 4;

    // READ COMMITTED whatever the default is: at a higher level, whoever waited for another's
    // inbox row gets an error instead of the row.
    fn begin(wait: Duration, handler_timeout: Duration) -> String {
        // Without the time-outs the server goes on waiting when nobody waits for it any more,
        // and holds the inbox rows meanwhile. If the pool's own bound for a statement is
        // stricter, it stays. That for locks is put back when the inbox rows are written: which
        // locks the handler's own statements wait for is the handler's to bound.
        let (wait_ms, statement_ms) = (milliseconds(wait), milliseconds(handler_timeout));
        format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; \
             SELECT set_config('synchronous_commit', 'on', true), \
             set_config('handfast.lock_timeout', current_setting('lock_timeout'), true), \
             set_config('lock_timeout', '{wait_ms}', true), \
             set_config('statement_timeout', least({statement_ms}, nullif(extract(epoch \
             FROM current_setting('statement_timeout')::interval) * 1000, 0))::bigint::text, true)"
        )
    }

    // PostgreSQL takes nothing but a rollback after an error, so there is nothing to seal:
    // whether the transaction is still the one with the inbox rows is asked before the commit.
    async fn seal(_connection: &mut PgConnection, _seal: &Seal) -> Result<(), sqlx::Error> {
        Ok(())
    }

    async fn unseal(_connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        Ok(())
    }

    async fn migrate(connection: &mut PgConnection) -> Result<(), Error> {
        Owner::Inbox.apply(connection).await?;
        Ok(())
    }

    async fn check_durable(connection: &mut PgConnection) -> Result<(), Error> {
        // Settings of the server; that a commit waits for the disk is set by each transaction.
        let (fsync, full_page_writes): (String, String) =
            sqlx::query_as("SELECT current_setting('fsync'), current_setting('full_page_writes')")
                .fetch_one(connection)
                .await
                .map_err(|source| Error::Database {
                    doing: "read the settings of",
                    source,
                })?;
        refuse_if_not_durable(&fsync, &full_page_writes)
    }

    async fn record(
        connection: &mut PgConnection,
        subscription: &str,
        ids: &[Uuid],
    ) -> Result<Vec<Seen>, sqlx::Error> {
        // Put together before the time-out is put back, which holds for every row then.
        let (message_ids, times, now, _): (Vec<Uuid>, Vec<i64>, i64, String) = sqlx::query_as(
            r#"
            -- record
            WITH seen AS (
                INSERT INTO handfast_inbox AS inbox (subscription, message_id)
                SELECT $1, id
                  FROM unnest($2::uuid[]) AS id
                 ORDER BY id
                    ON CONFLICT (subscription, message_id) DO UPDATE SET seen = inbox.seen + 1
             RETURNING message_id, seen
            ), together AS MATERIALIZED (
                SELECT array_agg(message_id) AS message_ids, array_agg(seen) AS times FROM seen
            )
            SELECT message_ids, times, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
                   set_config('lock_timeout', current_setting('handfast.lock_timeout'), true)
              FROM together
            "#,
        )
        .bind(subscription)
        .bind(ids)
        .fetch_one(&mut *connection)
        .await?;
        let seen = |(message_id, times)| Seen {
            message_id,
            times,
            now,
        };
        Ok(message_ids.into_iter().zip(times).map(seen).collect())
    }

    async fn refuses_commit(
        connection: &mut PgConnection,
        _seal: &Seal,
    ) -> Result<Option<&'static str>, sqlx::Error> {
        // COMMIT of a failed transaction is a rollback that is no error. The inbox rows have
        // made an id for the transaction, which a transaction of the handler's has not.
        let asked =
            sqlx::query_scalar::<_, bool>("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
                .fetch_one(connection)
                .await;
        match asked {
            Ok(true) => Ok(None),
            Ok(false) => Ok(Some("the handler ended the transaction")),
            Err(error) if has_failed(&error) => Ok(Some(
                "a statement failed, which rolls everything back, but the handler said CONSUMED",
            )),
            Err(error) => Err(error),
        }
    }

    // A `begin` inside of the transaction that fails, or is dropped half-way, makes sqlx 0.9 queue
    // a ROLLBACK of all of it. While that waits for the next statement, there was none.
    fn went_on(connection: &PgConnection) -> bool {
        !connection.is_in_transaction() && !connection.should_flush()
    }

    fn is_about_data(code: &str) -> bool {
        ABOUT_DATA.iter().any(|class| code.starts_with(class))
    }

    async fn now(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            .fetch_one(connection)
            .await
    }

    async fn prune(
        connection: &mut PgConnection,
        subscription: &str,
        before: i64,
        limit_rows: u32,
    ) -> Result<u64, sqlx::Error> {
        let done = sqlx::query(
            r#"
            -- prune
            DELETE FROM handfast_inbox
             WHERE subscription = $1
               AND message_id = ANY (ARRAY(
                   SELECT message_id
                     FROM handfast_inbox
                    WHERE at < 'epoch'::timestamptz + $2 * interval '1 microsecond'
                      AND subscription = $1 -- another consumer may remember longer
                    ORDER BY at
                    LIMIT $3
                      FOR UPDATE SKIP LOCKED)) -- another consumer may prune too
            "#,
        )
        .bind(subscription)
        .bind(before)
        .bind(i64::from(limit_rows))
        .execute(connection)
        .await?;
        Ok(done.rows_affected())
    }
}

/// As a time-out of the server, of which 0 would mean for ever.
fn milliseconds(limit: Duration) -> u128 {
    limit.as_millis().clamp(1, i32::MAX as u128)
}

fn has_failed(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(DatabaseError::code)
        .is_some_and(|code| code == IN_FAILED_SQL_TRANSACTION)
}

fn refuse_if_not_durable(fsync: &str, full_page_writes: &str) -> Result<(), Error> {
    for (setting, found) in [("fsync", fsync), ("full_page_writes", full_page_writes)] {
        if found != "on" {
            return Err(Error::NotDurable {
                setting,
                found: found.to_owned(),
                wanted: "on",
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_forgets_at_a_power_cut_is_refused() {
        assert!(refuse_if_not_durable("on", "on").is_ok());
        let error = refuse_if_not_durable("on", "off").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the inbox's database is not durable: full_page_writes is off; set it to on"
        );
        assert!(refuse_if_not_durable("off", "on").is_err());
    }

    #[test]
    fn no_wait_of_the_server_is_for_ever() {
        for (limit, ms) in [
            (Duration::ZERO, "1"),
            (Duration::from_secs(2), "2000"),
            (Duration::MAX, "2147483647"),
        ] {
            let begin = Postgres::begin(limit, limit);
            let lock_timeout = format!("set_config('lock_timeout', '{ms}', true)");
            assert!(begin.contains(&lock_timeout), "{begin}");
            assert!(begin.contains(&format!("least({ms}, ")), "{begin}");
        }
    }

    #[test]
    fn only_errors_of_the_datas_classes_are_about_the_data() {
        for code in ["22003", "23505", "23P01", "P0001"] {
            assert!(Postgres::is_about_data(code), "{code}");
        }
        // A failed transaction, a deadlock, a full disk, a time-out, a shutdown.
        for code in ["25P02", "40P01", "53100", "57014", "57P01"] {
            assert!(!Postgres::is_about_data(code), "{code}");
        }
    }
}
