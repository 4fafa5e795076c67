//! The open business transaction, and its ends: each is reached in bounded time.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use handfast_fail_points::{Point, hit};
use sqlx::{Pool, SqlSafeStr as _, Transaction};
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::bounded::{give_up, within};
use crate::fence::{FenceDatabase, FenceVerdict, acquire};

/// A commit that takes longer has an unknown outcome. A standby may have to be waited for.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// A rollback that takes longer is left to the database, which sees the connection close.
const ROLLBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// The open business transaction: a database connection that knows its message.
///
/// Commit and rollback belong to the SDK. `&mut **tx` is the connection.
pub struct Tx<DB: FenceDatabase> {
    /// None only after the end has begun, which takes the whole of it.
    open: Option<Transaction<'static, DB>>,
    message_id: Uuid,
}

impl<DB: FenceDatabase> Tx<DB> {
    /// The id that the message has if this try commits.
    pub const fn message_id(&self) -> Uuid {
        self.message_id
    }

    /// Begins, with the fence row as the first statement; None if the row was there before.
    pub(crate) async fn begin(pool: &Pool<DB>, id: Uuid) -> Result<Option<Self>, sqlx::Error> {
        let connection = acquire(pool).await?;
        let transaction = Transaction::begin(connection, Some(DB::BEGIN.into_sql_str())).await?;
        let mut tx = Self {
            open: Some(transaction),
            message_id: id,
        };
        match DB::insert(&mut tx, id, FenceVerdict::Committed).await {
            Ok(true) => {}
            Ok(false) => return tx.leave().await.map(|()| None),
            // Above READ COMMITTED this is how PostgreSQL says that a check was faster.
            Err(error) if DB::is_busy(&error) => return tx.leave().await.map(|()| None),
            Err(error) => return Err(error),
        }
        DB::hold(&mut tx).await?;
        hit(Point::PRODUCER_FENCED);
        Ok(Some(tx))
    }

    /// Commits. After an error only the fence knows whether it did.
    pub(crate) async fn commit(self) -> Result<(), sqlx::Error> {
        self.commit_within(COMMIT_TIMEOUT).await
    }

    async fn commit_within(self, limit: Duration) -> Result<(), sqlx::Error> {
        let committed = within(limit, self.commit_if_it_may()).await;
        committed.unwrap_or_else(|| Err(no_reply()))
    }

    /// After a failed statement PostgreSQL rolls back at COMMIT and calls that a success, and
    /// SQLite may be in another transaction by then, so the database is asked before.
    async fn commit_if_it_may(mut self) -> Result<(), sqlx::Error> {
        let id = self.message_id;
        if !DB::may_commit(&mut self, id).await? {
            let what = "the business, or an error in it, has ended its transaction";
            return Err(sqlx::Error::Protocol(what.to_owned()));
        }
        DB::release(&mut self).await?;
        match self.open.take() {
            Some(transaction) => transaction.commit().await,
            None => Err(sqlx::Error::WorkerCrashed),
        }
    }

    /// Rolls back. After an error the connection is not used again, and its end is another
    /// rollback.
    pub(crate) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        match self.open.take() {
            Some(transaction) => roll_back(transaction, self.message_id).await,
            None => Ok(()),
        }
    }

    /// Rolls back what no business has touched.
    async fn leave(mut self) -> Result<(), sqlx::Error> {
        match self.open.take() {
            Some(transaction) => transaction.rollback().await,
            None => Ok(()),
        }
    }
}

/// Rolls back whatever the business has left, and hands the connection back if it is sound.
async fn roll_back<DB: FenceDatabase>(
    mut transaction: Transaction<'static, DB>,
    id: Uuid,
) -> Result<(), sqlx::Error> {
    let rolled_back = within(ROLLBACK_TIMEOUT, async move {
        let is_open = is_open(&mut transaction, id).await;
        if let Ok(true) = is_open {
            return transaction.rollback().await;
        }
        // If it has ended, sqlx still counts it, and would take a BEGIN for one inside of it.
        give_up(transaction);
        is_open.map(drop)
    });
    rolled_back.await.unwrap_or_else(|| Err(no_reply()))
}

/// Whether there is something to roll back; then the connection is for others again.
async fn is_open<DB: FenceDatabase>(
    transaction: &mut Transaction<'static, DB>,
    id: Uuid,
) -> Result<bool, sqlx::Error> {
    if DB::has_ended(transaction, id).await? {
        return Ok(false);
    }
    DB::release(transaction).await?;
    Ok(true)
}

/// What a database that does not answer is taken to have said.
fn no_reply() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

/// Rolls back behind the back of who dropped it.
impl<DB: FenceDatabase> Drop for Tx<DB> {
    fn drop(&mut self) {
        let Some(transaction) = self.open.take() else {
            return;
        };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(roll_back(transaction, self.message_id))),
            Err(_) => give_up(transaction),
        }
    }
}

impl<DB: FenceDatabase> Deref for Tx<DB> {
    type Target = DB::Connection;

    #[expect(
        clippy::expect_used,
        reason = "who takes the transaction takes the whole of it"
    )]
    fn deref(&self) -> &Self::Target {
        self.open.as_ref().expect("the transaction is open")
    }
}

impl<DB: FenceDatabase> DerefMut for Tx<DB> {
    #[expect(
        clippy::expect_used,
        reason = "who takes the transaction takes the whole of it"
    )]
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.open.as_mut().expect("the transaction is open")
    }
}

impl<DB: FenceDatabase> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx")
            .field("message_id", &self.message_id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use handfast_scratch::Scratch;
    use sqlx::postgres::PgPoolOptions;

    use super::proxy::Proxy;
    use super::*;
    use crate::fence::{Fence, Settled, migrate};

    /// How long a condition may take to come true.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_commit_that_hangs_is_unknown_and_its_place_in_the_pool_is_free() {
        let scratch = Scratch::create().await;
        let proxy = Proxy::before(&scratch.options()).await;
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(PATIENCE)
            .connect_lazy_with(proxy.options(scratch.options()));
        migrate(&pool).await.unwrap();
        let id = Uuid::now_v7();
        let tx = Tx::begin(&pool, id).await.unwrap().unwrap();
        proxy.swallow("COMMIT", 1);
        let committed = tx.commit_within(Duration::from_millis(200)).await;
        assert!(
            matches!(committed, Err(sqlx::Error::Io(_))),
            "{committed:?}"
        );
        // Only the replies were lost.
        let fence = Fence::open(&pool).await.unwrap();
        assert_eq!(fence.settle(id).await.unwrap(), Settled::Committed);
    }
}

#[cfg(test)]
#[expect(dead_code, reason = "the tests of the whole SDK use more of it")]
#[path = "../tests/sdk/postgres/proxy.rs"]
mod proxy;
