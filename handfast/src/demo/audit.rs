//! What came out, read from the four databases and from nothing else.

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

mod mirror;

use super::engines::Engines;
use super::home::Home;
use super::plan::Role;

/// Of the orders that something is wrong with, at most so many are named.
pub(crate) const MAX_NAMED: i64 = 20;

/// The numbers. One effect is one voucher or one grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// Tries to pay, each written down before it began.
    pub(crate) attempted: i64,
    /// Tries that committed.
    pub(crate) committed: i64,
    /// Tries that did not.
    pub(crate) rolled_back: i64,
    /// Messages that the service keeps.
    pub(crate) prepared: i64,
    /// Decided by the producer's word.
    pub(crate) confirmed_by_producer: i64,
    /// Decided because the service asked.
    pub(crate) confirmed_by_check: i64,
    /// Decided by the producer's word.
    pub(crate) cancelled_by_producer: i64,
    /// Decided because the service asked.
    pub(crate) cancelled_by_check: i64,
    /// Vouchers.
    pub(crate) accounting_effects: i64,
    /// Grants.
    pub(crate) points_effects: i64,
    /// How often the inboxes saw a message.
    pub(crate) deliveries: i64,
    /// How often they had seen it before.
    pub(crate) duplicates_absorbed: i64,
    /// Paid, and not booked or not rewarded.
    pub(crate) lost: i64,
    /// Booked or rewarded, and not paid.
    pub(crate) phantom: i64,
    /// Paid, booked or rewarded more than once.
    pub(crate) doubled: i64,
    /// Vouchers whose lines do not sum to zero.
    pub(crate) unbalanced: i64,
    /// Messages, deliveries and payments that are not at their end.
    pub(crate) unfinished: i64,
}

/// The databases, attached to one connection that cannot write; or a copy of those on a server.
pub(crate) struct Books {
    db: SqliteConnection,
}

const UNFINISHED: &str = "
    SELECT (SELECT count(*) FROM message WHERE state NOT IN ('CONFIRMED', 'CANCELLED'))
         + (SELECT count(*) FROM delivery WHERE state NOT IN ('CONSUMED', 'SKIPPED'))
         + (SELECT count(*) FROM payment.payment WHERE state = 'PAYING')";

const LOST: &str = "
    FROM payment.pay_done AS done
   WHERE message_id NOT IN (SELECT message_id FROM accounting.voucher)
      OR message_id NOT IN (SELECT message_id FROM points.point_grant)";

/// Everything that consumers have done, one row per effect.
const EFFECTS: &str = "
    (SELECT 'accounting' AS party, message_id, caller, order_id FROM accounting.voucher
     UNION ALL
     SELECT 'points', message_id, caller, order_id FROM points.point_grant)";

const UNBALANCED: &str = "
    FROM accounting.voucher AS voucher
   WHERE coalesce((SELECT sum(amount) FROM accounting.voucher_line
                    WHERE voucher = voucher.id), -1) <> 0";

impl Books {
    /// Opens them. They have to exist. A copy tells of this moment only.
    pub(crate) async fn open(home: &Home) -> Result<Self, sqlx::Error> {
        if home.engines().is_production() {
            let db = mirror::copy(home.engines()).await?;
            return Ok(Self { db });
        }
        // What is attached inherits that it is only read.
        let mut db = SqliteConnectOptions::new()
            .filename(home.database(Role::Service))
            .read_only(true)
            .connect()
            .await?;
        for role in [Role::Payment, Role::Accounting, Role::Points] {
            let file = home.database(role).to_string_lossy().into_owned();
            sqlx::query(AssertSqlSafe(format!("ATTACH ? AS {role}")))
                .bind(file)
                .execute(&mut db)
                .await?;
        }
        Ok(Self { db })
    }

    /// Closes them, so that their owners can tidy up.
    pub(crate) async fn close(self) -> Result<(), sqlx::Error> {
        self.db.close().await
    }

    /// How much is not at its end.
    pub(crate) async fn unfinished(&mut self) -> Result<i64, sqlx::Error> {
        self.number(UNFINISHED).await
    }

    /// All numbers. They are consistent only while nobody writes.
    pub(crate) async fn numbers(&mut self) -> Result<Numbers, sqlx::Error> {
        Ok(Numbers {
            attempted: self.count("FROM payment.pay_try").await?,
            committed: self.count("FROM payment.pay_done").await?,
            rolled_back: self
                .count(
                    "FROM payment.pay_try
                      WHERE try_id NOT IN (SELECT try_id FROM payment.pay_done)",
                )
                .await?,
            prepared: self.count("FROM message").await?,
            confirmed_by_producer: self.decided("CONFIRMED", "PRODUCER").await?,
            confirmed_by_check: self.decided("CONFIRMED", "CHECK").await?,
            cancelled_by_producer: self.decided("CANCELLED", "PRODUCER").await?,
            cancelled_by_check: self.decided("CANCELLED", "CHECK").await?,
            accounting_effects: self.count("FROM accounting.voucher").await?,
            points_effects: self.count("FROM points.point_grant").await?,
            deliveries: self.number(&seen("seen")).await?,
            duplicates_absorbed: self.number(&seen("seen - 1")).await?,
            lost: self.count(LOST).await?,
            phantom: self
                .count(&format!(
                    "FROM {EFFECTS}
                      WHERE message_id NOT IN (SELECT message_id FROM payment.pay_done)"
                ))
                .await?,
            doubled: self
                .number(&format!(
                    "SELECT (SELECT count(*) FROM {EFFECTS})
                          - (SELECT count(*) FROM (SELECT DISTINCT party, message_id
                                                     FROM {EFFECTS}))
                          + (SELECT count(*) FROM payment.pay_done)
                          - (SELECT count(*) FROM (SELECT DISTINCT caller, order_id
                                                     FROM payment.pay_done))"
                ))
                .await?,
            unbalanced: self.count(UNBALANCED).await?,
            unfinished: self.unfinished().await?,
        })
    }

    /// The orders behind the numbers that should be zero, one line each.
    pub(crate) async fn named(&mut self) -> Result<Vec<String>, sqlx::Error> {
        let mut lines = Vec::new();
        for sql in [
            format!(
                "SELECT 'lost: ' || caller || '/' || order_id ||
                        CASE WHEN message_id IN (SELECT message_id FROM accounting.voucher)
                             THEN ' has no grant' ELSE ' has no voucher' END
                        || ', message ' || lower(hex(message_id)) {LOST}"
            ),
            format!(
                "SELECT 'phantom: ' || party || ' has ' || caller || '/' || order_id
                        || ', message ' || lower(hex(message_id))
                   FROM {EFFECTS}
                  WHERE message_id NOT IN (SELECT message_id FROM payment.pay_done)"
            ),
            format!(
                "SELECT 'doubled: ' || party || ' has ' || count(*) || ' times '
                        || caller || '/' || order_id || ', message ' || lower(hex(message_id))
                   FROM {EFFECTS}
                  GROUP BY party, message_id HAVING count(*) > 1"
            ),
            "SELECT 'doubled: payment has paid ' || count(*) || ' times '
                    || caller || '/' || order_id
               FROM payment.pay_done
              GROUP BY caller, order_id HAVING count(*) > 1"
                .to_owned(),
            format!(
                "SELECT 'unbalanced: ' || caller || '/' || order_id || ', voucher ' || id
                        {UNBALANCED}"
            ),
            "SELECT 'unfinished: ' || coalesce(key, 'no key') || ', message '
                    || lower(hex(id)) || ' is ' || state
               FROM message WHERE state NOT IN ('CONFIRMED', 'CANCELLED')"
                .to_owned(),
            "SELECT 'unfinished: ' || coalesce(key, 'no key') || ', message '
                    || lower(hex(id)) || ' is ' || delivery.state || ' for ' || subscription
                    || coalesce(' (' || last_error || ')', '')
               FROM delivery JOIN message ON id = message_id
              WHERE delivery.state NOT IN ('CONSUMED', 'SKIPPED')"
                .to_owned(),
            "SELECT 'unfinished: ' || caller || '/' || order_id || ' is ' || state
               FROM payment.payment WHERE state = 'PAYING'"
                .to_owned(),
        ] {
            let sql = format!("{sql} LIMIT {MAX_NAMED}");
            let found: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql))
                .fetch_all(&mut self.db)
                .await?;
            lines.extend(found);
        }
        Ok(lines)
    }

    /// What is in payment's accounts.
    pub(crate) async fn balances(&mut self) -> Result<Vec<(String, i64)>, sqlx::Error> {
        sqlx::query_as("SELECT name, balance FROM payment.account")
            .fetch_all(&mut self.db)
            .await
    }

    /// How many messages a decision and its contrary were heard of.
    pub(crate) async fn conflicts(&mut self) -> Result<i64, sqlx::Error> {
        self.count("FROM message WHERE conflict <> 0").await
    }

    async fn decided(&mut self, state: &str, by: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("SELECT count(*) FROM message WHERE state = ? AND decided_by = ?")
            .bind(state)
            .bind(by)
            .fetch_one(&mut self.db)
            .await
    }

    async fn count(&mut self, from: &str) -> Result<i64, sqlx::Error> {
        self.number(&format!("SELECT count(*) {from}")).await
    }

    async fn number(&mut self, sql: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned()))
            .fetch_one(&mut self.db)
            .await
    }
}

/// A sum over both inboxes.
fn seen(what: &str) -> String {
    let of = |party| format!("(SELECT coalesce(sum({what}), 0) FROM {party}.handfast_inbox)");
    format!("SELECT {} + {}", of("accounting"), of("points"))
}
