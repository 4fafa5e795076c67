//! Days on which a server is down, frozen, full, or no longer lets us in. Each story brings the
//! server that it breaks, so these run one after the other: `cargo xtask test` does so.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod alarms;
mod beside_two_replicas;
mod postgres_refuses;
mod postgres_restarts;
mod queues;
mod rabbitmq_away;
mod rabbitmq_loses_all;
mod scene;
