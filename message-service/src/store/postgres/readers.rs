//! Reading beside the lanes: a few connections, one statement at a time.
//!
//! A read changes nothing, so it is repeated when the connection turns out to be gone.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::Semaphore;

use super::rows::error;
use super::session::{Repeats, Session, Trouble, Use, trouble};
use crate::store::Error;

/// How long a read waits for a free connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a read is tried.
const TRIES: u32 = 2;

pub(super) struct Readers {
    shared: Arc<Shared>,
}

struct Shared {
    options: Arc<PgConnectOptions>,
    free: Semaphore,
    idle: Mutex<Vec<Session>>,
    repeats: Arc<Repeats>,
}

impl Readers {
    pub(super) fn new(
        options: Arc<PgConnectOptions>,
        connections: usize,
        repeats: Arc<Repeats>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                options,
                free: Semaphore::new(connections.max(1)),
                idle: Mutex::default(),
                repeats,
            }),
        }
    }

    /// Runs a read in a task of its own, so that a caller who goes away leaves no connection
    /// half-way.
    pub(super) async fn read<T, F>(&self, doing: &'static str, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'c> Fn(&'c mut Session) -> BoxFuture<'c, Result<T, sqlx::Error>> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let task = tokio::spawn(async move { shared.read(doing, read).await });
        match task.await {
            Ok(result) => result,
            // Only a panic in the read itself comes here, since nobody aborts the task.
            Err(gone) => Err(error(doing)(sqlx::Error::Io(std::io::Error::other(gone)))),
        }
    }

    /// Lets reads end and refuses further ones.
    pub(super) async fn close(&self) {
        self.shared.free.close();
        let idle = std::mem::take(&mut *self.shared.lock());
        for mut session in idle {
            session.close().await;
        }
    }
}

impl Shared {
    async fn read<T, F>(&self, doing: &'static str, read: F) -> Result<T, Error>
    where
        F: for<'c> Fn(&'c mut Session) -> BoxFuture<'c, Result<T, sqlx::Error>>,
    {
        let busy = |why| Error::Busy { doing, why };
        let _permit = tokio::time::timeout(PATIENCE, self.free.acquire())
            .await
            .map_err(|_| busy("has too much to do"))?
            .map_err(|_| busy("is stopping"))?;
        let idle = self.lock().pop();
        let mut session = idle.unwrap_or_else(|| {
            Session::new(
                Arc::clone(&self.options),
                Use::Read,
                Arc::clone(&self.repeats),
            )
        });
        let mut tries = 1;
        let result = loop {
            match read(&mut session).await {
                Err(error) if trouble(&error) == Trouble::Unavailable && tries < TRIES => {
                    tries += 1;
                }
                result => break result.map_err(error(doing)),
            }
        };
        self.lock().push(session);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Session>> {
        // A panic while the lock is held leaves a whole list.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
