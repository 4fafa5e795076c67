//! Work on a connection that ends in bounded time, whatever has become of the connection.
//!
//! A pool of sqlx takes a dropped connection back in a task, which asks it for an answer first,
//! waits for that without a bound, and keeps the connection's place in the pool meanwhile. If
//! the way to the database swallows replies, each such connection costs the pool a place, until
//! none is left. So what does not answer in time is given up instead: its connection is closed
//! without a question, and the place is free at once.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// Does work that holds connections, for this long; None if it was given up.
pub(crate) async fn within<W: Future>(limit: Duration, work: W) -> Option<W::Output> {
    let mut work = Box::pin(work);
    let done = timeout(limit, work.as_mut()).await.ok();
    if done.is_none() {
        give_up(work);
    }
    done
}

/// Does work that holds connections, until then; None if it was given up.
pub(crate) async fn until<W: Future>(ends: Instant, work: W) -> Option<W::Output> {
    within(ends.saturating_duration_since(Instant::now()), work).await
}

/// Drops what holds a connection, and closes the connection without asking it anything.
pub(crate) fn give_up<T>(holder: T) {
    // `close_on_drop` cannot be called on the connection of a transaction. But sqlx starts its
    // task on the runtime that is entered, and frees the place when that task is dropped: this
    // runtime ends before it has run anything.
    let Ok(ending) = tokio::runtime::Builder::new_current_thread().build() else {
        return;
    };
    let here = ending.enter();
    drop(holder);
    drop(here);
    ending.shutdown_background();
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use sqlx::sqlite::SqlitePoolOptions;

    use super::*;

    #[tokio::test]
    async fn what_is_given_up_leaves_its_place_in_the_pool_at_once() {
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect("sqlite::memory:")
            .await
            .unwrap();
        for _ in 0..3 {
            let transaction = pool.begin().await.unwrap();
            let given_up = within(Duration::ZERO, async move {
                let _open = transaction;
                pending::<()>().await;
            });
            assert_eq!(given_up.await, None);
            assert_eq!(pool.size(), 0);
        }
        let kept = within(Duration::from_secs(20), pool.acquire()).await;
        drop(kept.unwrap().unwrap());
        assert_eq!(pool.size(), 1);
    }
}
