//! A turn at a pass that one process runs for all.
//!
//! Nobody leads. Whoever finds that the pass is due, takes the turn, and the others wait for the
//! next one; a process that dies in its turn is missed for one period. A turn only saves work:
//! what a pass writes repeats in the store what it was decided on, so one that goes on after its
//! turn, because it was frozen in the middle, harms nobody.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::store::{Error, Shared, Store, TakeTurn};

/// What this process needs to take turns at one pass.
#[derive(Clone)]
pub struct Turn {
    store: Arc<dyn Store>,
    take: TakeTurn,
    /// When the turn was last known to be this process's.
    mine_at: Arc<Mutex<Instant>>,
}

impl Turn {
    /// Of this process, at this pass, which is due once per `period`.
    pub fn new(store: Arc<dyn Store>, pass: Shared, replica: Uuid, period: Duration) -> Self {
        let take = TakeTurn {
            pass,
            replica,
            period,
            again: false,
        };
        Self {
            store,
            take,
            mine_at: Arc::new(Mutex::new(Instant::now())),
        }
    }

    /// Takes the turn, or says after how long to ask again.
    pub async fn take(&self) -> Result<Option<Duration>, Error> {
        self.ask(self.take).await
    }

    /// To be asked between the steps of a run, and prolongs the turn of one that takes long.
    /// False if another process has taken it meanwhile: the rest is that one's.
    pub async fn keep(&self) -> Result<bool, Error> {
        // Each answer is a commit, and half of the turn is time enough for the next one.
        if self.mine_at().elapsed() < self.take.period / 2 {
            return Ok(true);
        }
        let again = TakeTurn {
            again: true,
            ..self.take
        };
        Ok(self.ask(again).await?.is_none())
    }

    async fn ask(&self, take: TakeTurn) -> Result<Option<Duration>, Error> {
        let asked = Instant::now();
        let wait = self.store.take_turn(take).await?;
        if wait.is_none() {
            *self.mine_at() = asked;
        }
        Ok(wait)
    }

    fn mine_at(&self) -> std::sync::MutexGuard<'_, Instant> {
        // A panic while the lock is held leaves a whole moment.
        self.mine_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn")
            .field("take", &self.take)
            .finish_non_exhaustive()
    }
}
