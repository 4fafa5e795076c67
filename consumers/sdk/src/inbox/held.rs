//! A pooled connection that goes back to its pool only when it is known to be clean.

use sqlx::Pool;
use sqlx::pool::PoolConnection;

use super::InboxDatabase;

/// A connection with which something is done that may be dropped half-way.
///
/// A begin, statement or commit that was dropped leaves a connection that may still be inside
/// a transaction. Closing it rolls back; the pool opens another.
pub(crate) struct Held<D: InboxDatabase> {
    pub(crate) connection: PoolConnection<D>,
    /// It is certainly outside of a transaction, and nothing of ours is left on it.
    pub(crate) clean: bool,
}

impl<D: InboxDatabase> Held<D> {
    pub(crate) async fn acquire(pool: &Pool<D>) -> Result<Self, sqlx::Error> {
        Ok(Self {
            connection: pool.acquire().await?,
            clean: false,
        })
    }
}

impl<D: InboxDatabase> Drop for Held<D> {
    fn drop(&mut self) {
        if !self.clean {
            self.connection.close_on_drop();
        }
    }
}
