//! `handfast demo` from the outside: what it says, how it ends, and what it leaves behind.

#![cfg(feature = "demo")]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails loudly"
)]

mod endings;
mod process;
mod refusals;
mod runs;
mod servers;
