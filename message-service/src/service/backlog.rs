//! How much may be unfinished before new messages are refused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::{Error, store};

/// The backlog is measured at most this often.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// Counting millions must not be what the store does most.
const WORTH: u32 = 10;

/// The bound on what is unfinished. Verbs that make it smaller do not ask it.
#[derive(Debug)]
pub(super) struct Backlog {
    limit_bytes: u64,
    fresh_for: Duration,
    /// How many times as long as it took a measurement holds.
    worth: u32,
    last: Mutex<Option<Measured>>,
    /// Held while the store is measured, so that callers share one measurement.
    measuring: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    bytes: u64,
    holds_until: Instant,
}

impl Measured {
    fn holds(&self) -> bool {
        Instant::now() < self.holds_until
    }
}

impl Backlog {
    /// This many bytes may be unfinished.
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            fresh_for: FRESH_FOR,
            worth: WORTH,
            last: Mutex::default(),
            measuring: Arc::default(),
        }
    }

    /// `Ok(Err(..))` above the limit. `measure` asks the store. Nobody waits for that who was let
    /// in by the measurement before.
    pub(super) async fn check<F>(
        self: &Arc<Self>,
        measure: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Result<(), Error>, store::Error>
    where
        F: Future<Output = Result<u64, store::Error>> + Send,
    {
        let backlog_bytes = match self.last() {
            Some(last) if last.holds() => last.bytes,
            Some(last) if last.bytes <= self.limit_bytes => {
                if let Ok(turn) = Arc::clone(&self.measuring).try_lock_owned() {
                    let backlog = Arc::clone(self);
                    tokio::spawn(async move {
                        let _turn = turn;
                        if let Err(error) = backlog.measure(measure).await {
                            tracing::warn!(%error, "cannot measure the backlog: {error}");
                            // The next one waits for a measurement, and is told why there is none.
                            *backlog.lock() = None;
                        }
                    });
                }
                last.bytes
            }
            Some(_) | None => {
                let _turn = self.measuring.lock().await;
                match self.last() {
                    Some(last) if last.holds() => last.bytes,
                    Some(_) | None => self.measure(measure).await?,
                }
            }
        };
        Ok(if backlog_bytes > self.limit_bytes {
            Err(Error::BacklogFull {
                backlog_bytes,
                limit_bytes: self.limit_bytes,
            })
        } else {
            Ok(())
        })
    }

    async fn measure<F>(&self, measure: impl FnOnce() -> F) -> Result<u64, store::Error>
    where
        F: Future<Output = Result<u64, store::Error>>,
    {
        let began = Instant::now();
        let bytes = measure().await?;
        let worth = self.fresh_for.max(self.worth * began.elapsed());
        let holds_until = Instant::now() + worth;
        *self.lock() = Some(Measured { bytes, holds_until });
        Ok(bytes)
    }

    fn last(&self) -> Option<Measured> {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Measured>> {
        // A panic while the lock is held leaves a whole measurement.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backlog(fresh_for: Duration) -> Arc<Backlog> {
        Arc::new(Backlog {
            fresh_for,
            worth: 0,
            ..Backlog::new(100)
        })
    }

    async fn measured(backlog: &Backlog, bytes: u64) {
        while backlog.last().map(|last| last.bytes) != Some(bytes) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn only_what_is_above_the_limit_is_refused() {
        let backlog = backlog(Duration::ZERO);
        backlog.check(|| async { Ok(100) }).await.unwrap().unwrap();
        backlog.check(|| async { Ok(101) }).await.unwrap().unwrap();
        measured(&backlog, 101).await;
        assert_eq!(
            backlog.check(|| async { Ok(102) }).await.unwrap(),
            Err(Error::BacklogFull {
                backlog_bytes: 102,
                limit_bytes: 100
            })
        );
        backlog.check(|| async { Ok(99) }).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_was_let_in_before_does_not_wait_for_a_slow_measurement() {
        let backlog = backlog(Duration::ZERO);
        backlog.check(|| async { Ok(1) }).await.unwrap().unwrap();
        for _ in 0..2 {
            let never = || std::future::pending::<Result<u64, store::Error>>();
            backlog.check(never).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn nobody_is_let_in_for_long_by_a_measurement_that_cannot_be_repeated() {
        let backlog = backlog(Duration::ZERO);
        let away = || async {
            Err(store::Error::Busy {
                doing: "count",
                why: "is stopping",
            })
        };
        backlog.check(|| async { Ok(1) }).await.unwrap().unwrap();
        backlog.check(away).await.unwrap().unwrap();
        while backlog.last().is_some() {
            tokio::task::yield_now().await;
        }
        backlog.check(away).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_fresh_size_is_not_read_again() {
        let backlog = backlog(Duration::from_secs(3600));
        backlog.check(|| async { Ok(1) }).await.unwrap().unwrap();
        let unread = || async { panic!("read again") };
        backlog.check(unread).await.unwrap().unwrap();
    }
}
