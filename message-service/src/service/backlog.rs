//! How much may be unfinished before new messages are refused.

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
    /// Held while the store is measured, so that callers share one measurement.
    last: tokio::sync::Mutex<Option<Measured>>,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    bytes: u64,
    holds_until: Instant,
}

impl Backlog {
    /// This many bytes may be unfinished.
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            fresh_for: FRESH_FOR,
            worth: WORTH,
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
        let backlog_bytes = match *last {
            Some(measured) if Instant::now() < measured.holds_until => measured.bytes,
            Some(_) | None => {
                let began = Instant::now();
                let bytes = measure().await?;
                let worth = self.fresh_for.max(self.worth * began.elapsed());
                let holds_until = Instant::now() + worth;
                *last = Some(Measured { bytes, holds_until });
                bytes
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_above_the_limit_is_refused() {
        let backlog = Backlog {
            fresh_for: Duration::ZERO,
            worth: 0,
            ..Backlog::new(100)
        };
        backlog.check(|| async { Ok(100) }).await.unwrap().unwrap();
        assert_eq!(
            backlog.check(|| async { Ok(101) }).await.unwrap(),
            Err(Error::BacklogFull {
                backlog_bytes: 101,
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
