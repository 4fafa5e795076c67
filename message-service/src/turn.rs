//! A turn at a pass that one process runs for all.
//!
//! Nobody leads. Whoever finds that the pass is due, takes the turn, and the others wait for the
//! next one; a process that dies in its turn is missed for one period. A turn only saves work:
//! what a pass writes repeats in the store what it was decided on, so one that goes on after its
//! turn, because it was frozen in the middle, harms nobody.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::store::{Error, Shared, Store, TakeTurn};

/// What this process needs to take turns at one pass.
#[derive(Clone)]
pub struct Turn {
    store: Arc<dyn Store>,
    take: TakeTurn,
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
        Self { store, take }
    }

    /// Takes the turn, or says after how long to ask again.
    pub async fn take(&self) -> Result<Option<Duration>, Error> {
        self.store.take_turn(self.take).await
    }

    /// Prolongs the turn of a run that takes longer than the period. False if another process
    /// has taken it meanwhile: the rest is that one's.
    pub async fn keep(&self) -> Result<bool, Error> {
        let again = TakeTurn {
            again: true,
            ..self.take
        };
        Ok(self.store.take_turn(again).await?.is_none())
    }
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn")
            .field("take", &self.take)
            .finish_non_exhaustive()
    }
}
