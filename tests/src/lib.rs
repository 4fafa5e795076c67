//! A small world to break things in: the service and the three reference services as real
//! processes, each with a database of its own, and the means to kill them, to ask them, and to
//! read from their databases whether every promise was kept. It runs on either pair of engines:
//! SQLite files and the embedded broker, or PostgreSQL and RabbitMQ.
//!
//! In reading order: [`wait`] (the only way to wait) · [`process`] (a child that can be killed)
//! · [`home`] (where databases and queues are) · [`database`] (looking at one of either kind) ·
//! [`config`] (what the service is told) · [`world`] (all of it together) · [`clients`] (who
//! calls) · [`reader`] (who reads a queue by hand) · [`consumer`] (a handler of the test's own) ·
//! [`status`] (a producer that answers as it is told) · [`proxy`], [`link`] (a network that fails)
//! · [`previous`] (the program as it was) · [`books`] (the promises, as statements about databases)
//! · [`history`] (what those who asked were told).

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

pub mod books;
pub mod clients;
pub mod config;
pub mod consumer;
pub mod database;
pub mod history;
pub mod home;
pub mod link;
pub mod previous;
pub mod process;
pub mod proxy;
pub mod reader;
pub mod status;
pub mod wait;
pub mod world;

pub use books::{Books, Floor};
pub use config::Config;
pub use consumer::{Consuming, Own, Schema};
pub use database::Database;
pub use history::{History, Merchants};
pub use home::{Engines, Servers};
pub use link::Link;
pub use wait::{eventually, stays};
pub use world::{Party, World};

/// Makes a test of each of these functions for each pair of engines.
#[macro_export]
macro_rules! on_both_engines {
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(#[tokio::test] async fn $name() { super::$name($crate::Engines::Embedded).await })*
        }

        mod production {
            $(#[tokio::test] async fn $name() { super::$name($crate::Engines::Production).await })*
        }
    };
}
