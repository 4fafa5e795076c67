//! The wire contract, `docs/guide/wire.md`: a producer and a consumer in Python that were
//! written from it, in front of the service on PostgreSQL and RabbitMQ; and its statements.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod by_hand;
mod document;
mod python;
mod scene;
mod scratch;
mod stories;
