//! The real binary: what it refuses, what it says, how it starts and how it ends.

#![expect(clippy::unwrap_used, reason = "tests may fail loudly")]

#[cfg(feature = "demo")]
mod fail_points;
mod migrate;
mod process;
mod refusals;
mod signals;
mod start;
