//! The service's own tables: accounts, payments, and the two journals of tries.
//!
//! SQLite lets one transaction write at a time, and lets those who wait poll for their turn.
//! So this process has one connection that writes, and its callers queue for it in order.

use std::path::Path;
use std::time::Duration;

use handfast_producer::Tx;
use sqlx::Sqlite;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use uuid::Uuid;

use crate::run::Error;

/// How long a statement waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
const READERS: u32 = 2;

/// The identity of a payment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// The merchant.
    pub caller: String,
    /// The merchant's name for the order.
    pub order_id: String,
}

/// Where a payment is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Accepted, not decided.
    Paying,
    /// The amount was taken and credited.
    Paid,
    /// Nothing was taken, and why.
    Refused(String),
}

/// One payment as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payment {
    /// Whose, and which.
    pub order: Order,
    /// Who pays.
    pub user: String,
    /// In minor units.
    pub amount: i64,
    /// Where it is.
    pub state: State,
}

/// Why the business transaction does not pay.
#[derive(Debug, thiserror::Error)]
pub enum Unpaid {
    /// The user has less than the amount.
    #[error("insufficient balance")]
    InsufficientBalance,
    /// Another try has decided the payment.
    #[error("the payment is not waiting to be paid")]
    NotPaying,
    /// A statement failed.
    #[error("cannot write the payment: {0}")]
    Database(#[from] sqlx::Error),
}

/// The database of this service.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) writer: SqlitePool,
    readers: SqlitePool,
}

/// Opens the file with durable settings and one connection, making it and its tables if they
/// do not exist.
pub async fn open_database(path: &Path) -> Result<SqlitePool, Error> {
    let failed = |source| Error::Database {
        path: path.to_owned(),
        source,
    };
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_with(connect_options(path))
        .await
        .map_err(failed)?;
    handfast_producer::migrate(&pool).await?;
    sqlx::raw_sql(include_str!("../migrations/0001_payment.sql"))
        .execute(&pool)
        .await
        .map_err(failed)?;
    Ok(pool)
}

/// Opens an account with a balance in minor units; one that exists is left as it is.
pub async fn open_account(pool: &SqlitePool, name: &str, balance: i64) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO account (name, balance) VALUES (?, ?) ON CONFLICT (name) DO NOTHING")
        .bind(name)
        .bind(balance)
        .execute(pool)
        .await?;
    Ok(())
}

impl Store {
    /// Opens the file; see [`open_database`].
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let writer = open_database(path).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(connect_options(path));
        Ok(Self { writer, readers })
    }

    /// Stores a payment as PAYING unless the order has one, and returns what is stored.
    /// `due_in` from now the job may work on it.
    pub async fn accept(
        &self,
        order: &Order,
        user: &str,
        amount: i64,
        due_in: Duration,
    ) -> Result<Payment, sqlx::Error> {
        let inserted = sqlx::query(
            "INSERT INTO payment
                 (caller, order_id, user, amount, state, created_at, updated_at, due_at)
             SELECT ?, ?, ?, ?, 'PAYING', now, now, now + ?
               FROM (SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER) AS now)
              WHERE true
             ON CONFLICT (caller, order_id) DO NOTHING",
        )
        .bind(&order.caller)
        .bind(&order.order_id)
        .bind(user)
        .bind(amount)
        .bind(micros(due_in))
        .execute(&self.writer)
        .await?;
        if inserted.rows_affected() == 1 {
            return Ok(Payment {
                order: order.clone(),
                user: user.to_owned(),
                amount,
                state: State::Paying,
            });
        }
        self.find(order).await?.ok_or(sqlx::Error::RowNotFound)
    }

    /// The payment of an order.
    pub async fn find(&self, order: &Order) -> Result<Option<Payment>, sqlx::Error> {
        let row: Option<(String, i64, String, Option<String>)> = sqlx::query_as(
            "SELECT user, amount, state, reason FROM payment WHERE caller = ? AND order_id = ?",
        )
        .bind(&order.caller)
        .bind(&order.order_id)
        .fetch_optional(&self.readers)
        .await?;
        let Some((user, amount, state, reason)) = row else {
            return Ok(None);
        };
        let state = match state.as_str() {
            "PAYING" => State::Paying,
            "PAID" => State::Paid,
            "REFUSED" => State::Refused(reason.unwrap_or_default()),
            other => {
                let unknown = format!("a payment has the state `{other}`");
                return Err(sqlx::Error::Decode(unknown.into()));
            }
        };
        Ok(Some(Payment {
            order: order.clone(),
            user,
            amount,
            state,
        }))
    }

    /// Notes that a transaction is going to be tried.
    pub async fn note_try(&self, try_id: Uuid, order: &Order) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO pay_try (try_id, caller, order_id, at)
             VALUES (?, ?, ?, CAST(unixepoch('subsec') * 1000000 AS INTEGER))",
        )
        .bind(&try_id.as_bytes()[..])
        .bind(&order.caller)
        .bind(&order.order_id)
        .execute(&self.writer)
        .await?;
        Ok(())
    }

    /// Marks a payment that is still PAYING as REFUSED.
    pub async fn refuse(&self, order: &Order, reason: &str) -> Result<(), sqlx::Error> {
        sqlx::query(
            "UPDATE payment
                SET state = 'REFUSED', reason = ?,
                    updated_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER)
              WHERE caller = ? AND order_id = ? AND state = 'PAYING'",
        )
        .bind(reason)
        .bind(&order.caller)
        .bind(&order.order_id)
        .execute(&self.writer)
        .await?;
        Ok(())
    }

    /// Takes payments that are due, oldest first, and makes them due again after `lease`:
    /// two jobs do not get the same one within that time.
    pub async fn claim_due(&self, lease: Duration, rows: u32) -> Result<Vec<Order>, sqlx::Error> {
        let orders: Vec<(String, String)> = sqlx::query_as(
            "UPDATE payment
                SET due_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER) + ?
              WHERE rowid IN (SELECT rowid FROM payment
                               WHERE state = 'PAYING'
                                 AND due_at <= CAST(unixepoch('subsec') * 1000000 AS INTEGER)
                               ORDER BY due_at LIMIT ?)
             RETURNING caller, order_id",
        )
        .bind(micros(lease))
        .bind(rows)
        .fetch_all(&self.writer)
        .await?;
        let orders = orders.into_iter();
        Ok(orders
            .map(|(caller, order_id)| Order { caller, order_id })
            .collect())
    }

    /// True if some payment is due; asks without writing.
    pub async fn has_due(&self) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM payment
                             WHERE state = 'PAYING'
                               AND due_at <= CAST(unixepoch('subsec') * 1000000 AS INTEGER))",
        )
        .fetch_one(&self.readers)
        .await
    }

    pub(crate) async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// The business transaction: take, credit, mark paid, note.
pub(crate) async fn pay(
    tx: &mut Tx<Sqlite>,
    try_id: Uuid,
    payment: &Payment,
) -> Result<(), Unpaid> {
    let message_id = tx.message_id();
    let db: &mut SqliteConnection = tx;
    let taken =
        sqlx::query("UPDATE account SET balance = balance - ? WHERE name = ? AND balance >= ?")
            .bind(payment.amount)
            .bind(&payment.user)
            .bind(payment.amount)
            .execute(&mut *db)
            .await?;
    if taken.rows_affected() == 0 {
        return Err(Unpaid::InsufficientBalance);
    }
    sqlx::query(
        "INSERT INTO account (name, balance) VALUES (?, ?)
         ON CONFLICT (name) DO UPDATE SET balance = balance + excluded.balance",
    )
    .bind(&payment.order.caller)
    .bind(payment.amount)
    .execute(&mut *db)
    .await?;
    let marked = sqlx::query(
        "UPDATE payment
            SET state = 'PAID', message_id = ?,
                updated_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER)
          WHERE caller = ? AND order_id = ? AND state = 'PAYING'",
    )
    .bind(&message_id.as_bytes()[..])
    .bind(&payment.order.caller)
    .bind(&payment.order.order_id)
    .execute(&mut *db)
    .await?;
    if marked.rows_affected() == 0 {
        return Err(Unpaid::NotPaying);
    }
    sqlx::query(
        "INSERT INTO pay_done (try_id, message_id, caller, order_id, at)
         VALUES (?, ?, ?, ?, CAST(unixepoch('subsec') * 1000000 AS INTEGER))",
    )
    .bind(&try_id.as_bytes()[..])
    .bind(&message_id.as_bytes()[..])
    .bind(&payment.order.caller)
    .bind(&payment.order.order_id)
    .execute(&mut *db)
    .await?;
    Ok(())
}

fn connect_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
