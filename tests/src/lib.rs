//! A small world to break things in: the service and the three reference services as real
//! processes, each with a database of its own, and the means to kill them, to ask them, and to
//! read from their databases whether every promise was kept.
//!
//! In reading order: [`wait`] (the only way to wait) · [`process`] (a child that can be killed)
//! · [`config`] (what the service is told) · [`world`] (all of it together) · [`clients`] (who
//! calls) · [`consumer`] (a handler of the test's own) · [`status`] (a producer that answers as
//! it is told) · [`books`] (the promises, as statements about databases).

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

pub mod books;
pub mod clients;
pub mod config;
pub mod consumer;
pub mod process;
pub mod status;
pub mod wait;
pub mod world;

pub use books::{Books, Floor};
pub use config::Config;
pub use consumer::Consuming;
pub use wait::{eventually, stays};
pub use world::{Party, World};
