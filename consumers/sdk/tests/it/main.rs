//! The SDK between a scripted service, over gRPC or RabbitMQ, and real databases.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod common;
mod effects;
mod guard;
mod link;
mod postgres;
mod rabbitmq;
mod sqlite;
mod start;
