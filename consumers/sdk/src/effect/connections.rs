//! The connections of one consumer, kept from one transaction to the next.
//!
//! A pool asks the server whether a connection lives, when it gives it and when it takes it back:
//! two trips of six, one of them before the handler. So while transactions follow each other, their
//! connection is not given back.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::Pool;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::inbox::InboxDatabase;
use crate::inbox::held::Held;

/// A connection that was not used for so long goes back: others may wait for it, and nobody knows
/// whether it lives.
pub(crate) const IDLE: Duration = Duration::from_millis(100);
/// One that was taken so long ago goes back all the same: the pool may want to end it.
const AT_MOST: Duration = Duration::from_secs(10);

pub(crate) struct Connections<D: InboxDatabase> {
    pool: Pool<D>,
    /// One that was not used for so long goes back.
    pub(super) idle: Duration,
    /// Where a pool takes connections back.
    runtime: Handle,
    /// The one that was used last comes last.
    kept: Mutex<Vec<Kept<D>>>,
}

/// A connection that is known to be clean.
struct Kept<D: InboxDatabase> {
    held: Held<D>,
    taken_at: Instant,
    used_at: Instant,
}

/// A connection for one transaction, which is closed unless it comes back.
pub(super) struct Taken<D: InboxDatabase> {
    pub(super) held: Held<D>,
    taken_at: Instant,
    /// The pool was not asked for it, so it may have been lost since it was used.
    pub(super) was_kept: bool,
}

impl<D: InboxDatabase> Connections<D> {
    /// Needs a runtime.
    pub(crate) fn new(pool: Pool<D>) -> Self {
        Self {
            pool,
            idle: IDLE,
            runtime: Handle::current(),
            kept: Mutex::default(),
        }
    }

    /// One that was kept, or one of the pool's.
    pub(super) async fn take(&self) -> Result<Taken<D>, sqlx::Error> {
        self.give_back(|kept| kept.used_at.elapsed() >= self.idle);
        let kept = self.kept().pop();
        if let Some(mut kept) = kept {
            kept.held.clean = false;
            return Ok(Taken {
                held: kept.held,
                taken_at: kept.taken_at,
                was_kept: true,
            });
        }
        Ok(Taken {
            held: Held::acquire(&self.pool).await?,
            taken_at: Instant::now(),
            was_kept: false,
        })
    }

    /// Keeps a connection, if it is clean and the pool has another to give.
    pub(super) fn put(&self, taken: Taken<D>) {
        let pool = &self.pool;
        let has_others = pool.size() < pool.options().get_max_connections() || pool.num_idle() > 0;
        let is_new = taken.taken_at.elapsed() < AT_MOST;
        if taken.held.clean && is_new && has_others && !pool.is_closed() {
            self.kept().push(Kept {
                held: taken.held,
                taken_at: taken.taken_at,
                used_at: Instant::now(),
            });
        }
    }

    /// Gives those back that were not used for a while; true if others are kept.
    pub(crate) fn tidy(&self) -> bool {
        self.give_back(|kept| kept.used_at.elapsed() >= self.idle);
        !self.kept().is_empty()
    }

    /// Gives all of them back.
    pub(crate) fn give_all_back(&self) {
        self.give_back(|_| true);
    }

    fn give_back(&self, which: impl Fn(&Kept<D>) -> bool) {
        let back: Vec<_> = self.kept().extract_if(.., |kept| which(kept)).collect();
        drop(back);
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept<D>>> {
        // A panic while the lock is held leaves whole connections.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: InboxDatabase> Drop for Connections<D> {
    fn drop(&mut self) {
        // The consumer's future may be dropped by a thread that is in none.
        let _runtime = self.runtime.enter();
        self.give_all_back();
    }
}
