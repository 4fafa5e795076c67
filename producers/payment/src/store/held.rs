//! A connection that a statement of our own runs on, for a bounded time.
//!
//! sqlx takes a dropped connection back only when it answers, and keeps its place in the pool
//! until then. So a connection whose statement was not answered is closed instead: a database
//! that cannot be reached for a while must not cost the pool its places.

use std::io::ErrorKind;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Database, Pool};
use tokio::time::error::Elapsed;

/// An answer that takes longer will not come. SQLite says by itself, and earlier, that it has
/// waited for another process for too long.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(8);

/// A pooled connection that goes back to its pool only if its statement was answered.
pub(super) struct Held<D: Database> {
    connection: PoolConnection<D>,
    answered: bool,
}

impl<D: Database> Held<D> {
    pub(super) async fn of(pool: &Pool<D>) -> Result<Self, sqlx::Error> {
        Ok(Self {
            connection: pool.acquire().await?,
            answered: false,
        })
    }

    /// The answer, if it came in time, whatever it says.
    pub(super) fn answered<T>(
        mut self,
        answer: Result<Result<T, sqlx::Error>, Elapsed>,
    ) -> Result<T, sqlx::Error> {
        self.answered = answer.is_ok();
        answer.unwrap_or_else(|_| Err(sqlx::Error::Io(ErrorKind::TimedOut.into())))
    }
}

impl<D: Database> Drop for Held<D> {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.close_on_drop();
        }
    }
}

impl<D: Database> Deref for Held<D> {
    type Target = D::Connection;

    fn deref(&self) -> &Self::Target {
        &self.connection
    }
}

impl<D: Database> DerefMut for Held<D> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.connection
    }
}
