//! How much the store may hold before new messages are refused.

use std::time::Duration;

use tokio::time::Instant;

use super::{Error, store};

/// The size is read at most this often.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// The bound on what the store holds. Verbs that make it smaller do not ask it.
#[derive(Debug)]
pub(super) struct Backlog {
    limit_bytes: u64,
    fresh_for: Duration,
    /// Held while the store is measured, so that callers share one measurement.
    last: tokio::sync::Mutex<Option<(Instant, u64)>>,
}

impl Backlog {
    /// The store may hold this many bytes.
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            fresh_for: FRESH_FOR,
            last: tokio::sync::Mutex::new(None),
        }
    }

    /// `Ok(Err(..))` above the limit. `measure` asks the store.
    pub(super) async fn check<F>(
        &self,
        measure: impl FnOnce() -> F,
    ) -> Result<Result<(), Error>, store::Error>
    where
        F: Future<Output = Result<u64, store::Error>>,
    {
        let mut last = self.last.lock().await;
        let used_bytes = match *last {
            Some((at, used)) if at.elapsed() < self.fresh_for => used,
            Some(_) | None => {
                let used = measure().await?;
                *last = Some((Instant::now(), used));
                used
            }
        };
        Ok(if used_bytes > self.limit_bytes {
            Err(Error::BacklogFull {
                used_bytes,
                limit_bytes: self.limit_bytes,
            })
        } else {
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_above_the_limit_is_refused() {
        let backlog = Backlog {
            fresh_for: Duration::ZERO,
            ..Backlog::new(100)
        };
        backlog.check(|| async { Ok(100) }).await.unwrap().unwrap();
        assert_eq!(
            backlog.check(|| async { Ok(101) }).await.unwrap(),
            Err(Error::BacklogFull {
                used_bytes: 101,
                limit_bytes: 100
            })
        );
        backlog.check(|| async { Ok(99) }).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_fresh_size_is_not_read_again() {
        let backlog = Backlog {
            fresh_for: Duration::from_secs(3600),
            ..Backlog::new(100)
        };
        backlog.check(|| async { Ok(1) }).await.unwrap().unwrap();
        let unread = backlog.check(|| async { panic!("read again") }).await;
        unread.unwrap().unwrap();
    }
}
