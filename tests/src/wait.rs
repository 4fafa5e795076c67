//! The one place where a test waits: for a condition, until a deadline, and it says what it
//! saw last.

use std::fmt::Display;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(20);

/// Looks until `look` is Ok, and returns what it found. The test fails after `deadline`, with
/// what `look` saw last.
pub async fn eventually<T>(
    what: impl Display,
    deadline: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let began = Instant::now();
    loop {
        let seen = match look().await {
            Ok(found) => return found,
            Err(seen) => seen,
        };
        assert!(
            began.elapsed() < deadline,
            "{what}: not within {deadline:?}; last seen: {seen}"
        );
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Looks for the whole of `time`; the test fails as soon as `look` is Err. For claims that
/// something does *not* happen, whose opposite takes less than `time`.
pub async fn stays(
    what: impl Display,
    time: Duration,
    mut look: impl AsyncFnMut() -> Result<(), String>,
) {
    let began = Instant::now();
    while began.elapsed() < time {
        if let Err(seen) = look().await {
            panic!("{what}: no longer after {:?}: {seen}", began.elapsed());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
