//! The store on a PostgreSQL server that is killed, frozen, full, or set up to forget. Each test
//! has a server of its own.

#![expect(
    clippy::unwrap_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod broken;
mod refused;
mod world;
