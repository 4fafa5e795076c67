//! Says that something is still being waited for.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(2);

/// Does the work; every two seconds a line says what it is waited for.
pub(crate) fn shown<T>(what: &str, work: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let (working, ended) = mpsc::channel::<()>();
        scope.spawn(move || {
            let began = Instant::now();
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                eprintln!("waiting for {what} ({} s)", began.elapsed().as_secs());
            }
        });
        let result = work();
        drop(working);
        result
    })
}
