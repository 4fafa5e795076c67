//! The inbox: what makes an effect happen once though its message may come more often.
//!
//! A message's row is inserted in the transaction of its effect, before the effect. Whoever
//! finds the row there already knows that the effect is durable and only answers again.

pub(crate) mod held;
mod postgres;
pub(crate) mod prune;
mod seal;
mod sqlite;

use std::future::Future;
use std::time::Duration;

use sqlx::Pool;
use uuid::Uuid;

use crate::error::Error;

pub use seal::Seal;

/// The connection inside the open transaction that holds the inbox rows and takes the effect.
///
/// Statements run on it with `.execute(&mut *tx)`. Only the SDK commits it. `tx.begin()` of
/// sqlx makes a savepoint.
pub type Tx<D = sqlx::Sqlite> = <D as sqlx::Database>::Connection;

/// A database that can hold an inbox.
///
/// The methods are what differs between databases: the text of statements, how a transaction
/// begins, what durable means. None of them retries.
pub trait InboxDatabase: sqlx::Database {
    /// How many transactions are worth running at the same time unless the program says
    /// otherwise.
    const CONCURRENCY: usize;

    /// The statement that begins a transaction which will write and whose commit will be
    /// durable. The database waits for another's inbox row at most `wait`, and leaves no
    /// statement running that nobody waits for any more, once it has run for `handler_timeout`.
    fn begin(wait: Duration, handler_timeout: Duration) -> String;

    /// Right after the begin: whatever is written on the connection from now on is committed
    /// only when the seal lets it, also if the transaction is lost before its end.
    fn seal(
        connection: &mut Self::Connection,
        seal: &Seal,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// After the end of the transaction: takes the seal off the connection.
    fn unseal(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Creates or updates the inbox's tables. A schema newer than this program is refused.
    fn migrate(connection: &mut Self::Connection)
    -> impl Future<Output = Result<(), Error>> + Send;

    /// Refuses a database that may lose a transaction it has committed.
    fn check_durable(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Inserts one row per id, or counts one more sight of those that are there, and says for
    /// each id in any order how often it was seen. The ids are all different and sorted, which
    /// is the order in which their rows are locked.
    fn record(
        connection: &mut Self::Connection,
        subscription: &str,
        ids: &[Uuid],
    ) -> impl Future<Output = Result<Vec<Seen>, sqlx::Error>> + Send;

    /// Asked inside of the transaction, before its commit: why a commit would not keep the
    /// effect though it would not fail, if there is such a reason.
    fn refuses_commit(
        connection: &mut Self::Connection,
        seal: &Seal,
    ) -> impl Future<Output = Result<Option<&'static str>, sqlx::Error>> + Send;

    /// Asked when a handler is done: whether it went on after its transaction had
    /// ended, so that what it wrote since may be durable without an inbox row.
    fn went_on(connection: &Self::Connection) -> bool;

    /// Whether an error of this code is about the data, such as a rule of the schema that
    /// refused them. Waiting does not heal it.
    fn is_about_data(code: &str) -> bool;

    /// The database's time, in microseconds since 1970 UTC.
    fn now(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<i64, sqlx::Error>> + Send;

    /// Removes at most `limit_rows` rows of the subscription that were written before `before`
    /// (microseconds since 1970 UTC), and says how many those were.
    fn prune(
        connection: &mut Self::Connection,
        subscription: &str,
        before: i64,
        limit_rows: u32,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;
}

/// How often the inbox has seen a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The message.
    pub message_id: Uuid,
    /// 1 for a message that is new.
    pub times: i64,
    /// The database's time, in microseconds since 1970 UTC.
    pub now: i64,
}

/// Brings the inbox's tables in this database up to date, as a consumer does at its start.
/// A schema newer than this program is an error, and is left as it is.
pub async fn migrate<D: InboxDatabase>(pool: &Pool<D>) -> Result<(), Error> {
    prepare(pool, false).await
}

/// Brings the tables up to date, and first refuses a database that is not durable if asked.
pub(crate) async fn prepare<D: InboxDatabase>(pool: &Pool<D>, durable: bool) -> Result<(), Error> {
    let pool = pool.clone();
    // In a task of its own, because a caller that stops waiting must not leave a pooled
    // connection inside a transaction.
    let task = tokio::spawn(async move {
        let mut connection = pool.acquire().await.map_err(|source| Error::Database {
            doing: "open",
            source,
        })?;
        if durable {
            D::check_durable(&mut connection).await?;
        }
        D::migrate(&mut connection).await
    });
    task.await.map_err(|error| Error::Task(error.to_string()))?
}
