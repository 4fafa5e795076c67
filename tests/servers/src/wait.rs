//! The one place where this crate waits: for a condition, until a deadline.

use std::time::{Duration, Instant};

use crate::Error;

const INTERVAL: Duration = Duration::from_millis(20);

/// Looks until there is something to see. Ends early with the error of `look`.
pub(crate) fn until<T>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let began = Instant::now();
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if began.elapsed() >= deadline {
            let seconds = deadline.as_secs();
            return Err(Error::new(format!("{what}: not within {seconds} s")));
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "no runtime here, and the condition is looked at again"
        )]
        std::thread::sleep(INTERVAL);
    }
}
