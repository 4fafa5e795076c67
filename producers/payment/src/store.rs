//! The service's own tables: accounts, payments, and the two journals of tries.
//!
//! The same statements run on SQLite and on PostgreSQL; how a database is opened is in
//! [`sqlite`] and [`postgres`]. Balances change by conditional UPDATEs, so that READ COMMITTED
//! is enough.

mod held;
pub mod postgres;
pub mod sqlite;
mod statements;

use std::future::Future;
use std::time::Duration;

use handfast_producer::{FenceDatabase, Tx};
use sqlx::{Pool, Postgres, Sqlite};
use tokio::time::timeout;
use uuid::Uuid;

use crate::database::Database;
use crate::run::Error;

/// How long a caller waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// At the end a connection that does not come back is waited for this long.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

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

/// The pools of one database. Where only one transaction writes at a time, its callers queue
/// for the one connection of `writer` in order.
#[derive(Debug)]
pub struct Store<D: sqlx::Database> {
    pub(crate) writer: Pool<D>,
    readers: Pool<D>,
}

// Not derived, because that would ask for a `D` that can be cloned.
impl<D: sqlx::Database> Clone for Store<D> {
    fn clone(&self) -> Self {
        Self {
            writer: self.writer.clone(),
            readers: self.readers.clone(),
        }
    }
}

impl<D: sqlx::Database> Store<D> {
    pub(crate) async fn close(&self) {
        let closed = async {
            self.readers.close().await;
            self.writer.close().await;
        };
        if timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::warn!("a connection to the database hangs and is left to the system");
        }
    }
}

/// What can be written and read, on every kind of database.
pub trait Records: Clone + Send + Sync + 'static {
    /// Which kind.
    type Database: FenceDatabase;

    /// Where the business transaction runs.
    fn writer(&self) -> &Pool<Self::Database>;

    /// Opens an account with a balance in minor units; one that exists is left as it is.
    fn open_account(
        &self,
        name: &str,
        balance: i64,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Stores a payment as PAYING unless the order has one, and returns what is stored.
    /// `due_in` from now the job may work on it.
    fn accept(
        &self,
        order: &Order,
        user: &str,
        amount: i64,
        due_in: Duration,
    ) -> impl Future<Output = Result<Payment, sqlx::Error>> + Send;

    /// The payment of an order.
    fn find(
        &self,
        order: &Order,
    ) -> impl Future<Output = Result<Option<Payment>, sqlx::Error>> + Send;

    /// Notes that a transaction is going to be tried.
    fn note_try(
        &self,
        try_id: Uuid,
        order: &Order,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Marks a payment that is still PAYING as REFUSED.
    fn refuse(
        &self,
        order: &Order,
        reason: &str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Takes payments that are due, oldest first, and makes them due again after `lease`:
    /// two jobs do not get the same one within that time.
    fn claim_due(
        &self,
        lease: Duration,
        rows: u32,
    ) -> impl Future<Output = Result<Vec<Order>, sqlx::Error>> + Send;

    /// True if some payment is due; asks without writing.
    fn has_due(&self) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;

    /// The business transaction: mark paid, note, take, credit.
    fn pay(
        tx: &mut Tx<Self::Database>,
        try_id: Uuid,
        payment: &Payment,
    ) -> impl Future<Output = Result<(), Unpaid>> + Send;
}

/// Opens accounts in a database, making it and its tables if they do not exist. An account
/// that exists is left as it is.
pub async fn open_accounts(
    database: &Database,
    accounts: impl IntoIterator<Item = (String, i64)> + Send,
) -> Result<(), Error> {
    match database {
        Database::File(path) => {
            let store = Store::<Sqlite>::open(path).await?;
            let opened = fill(&store, accounts).await;
            store.close().await;
            opened
        }
        Database::Server(options) => {
            let store = Store::<Postgres>::open(options).await?;
            let opened = fill(&store, accounts).await;
            store.close().await;
            opened
        }
    }
    .map_err(|source| Error::Database {
        database: database.clone(),
        source,
    })
}

async fn fill(
    store: &impl Records,
    accounts: impl IntoIterator<Item = (String, i64)>,
) -> Result<(), sqlx::Error> {
    for (name, balance) in accounts {
        store.open_account(&name, balance).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_does_not_come_back_does_not_hold_up_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::<Sqlite>::open(&folder.path().join("payment.db"))
            .await
            .unwrap();
        let kept = store.writer.acquire().await.unwrap();
        let closed = timeout(20 * CLOSE_TIMEOUT, store.close()).await;
        assert!(closed.is_ok());
        drop(kept);
    }
}
