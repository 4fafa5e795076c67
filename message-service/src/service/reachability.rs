//! Which producers answered when they were last asked.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Written by the checker, read by the console. It lives in memory: after a restart nobody
/// counts as unreachable until asked.
#[derive(Debug, Default)]
pub struct Reachability {
    producers: Mutex<BTreeMap<String, bool>>,
}

impl Reachability {
    /// The producer's status endpoint answered, or it did not.
    pub fn set(&self, producer: &str, reachable: bool) {
        let mut producers = self.lock();
        match producers.get_mut(producer) {
            Some(known) => *known = reachable,
            None => {
                producers.insert(producer.to_owned(), reachable);
            }
        }
    }

    /// True if the status endpoint did not answer when it was last asked.
    pub fn is_unreachable(&self, producer: &str) -> bool {
        self.lock().get(producer) == Some(&false)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, bool>> {
        // A panic while the lock is held leaves plain values, which are never half-written.
        self.producers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
