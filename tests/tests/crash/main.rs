//! What must come out right although a process dies in the middle of it. These tests run one
//! after the other: `cargo xtask test` does so.

#![expect(
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod beside_another;
mod disk_full;
mod every_point;
mod kills;
mod links;
mod mixed_versions;
mod shared_work;
mod starts_with_a_backlog;
mod two_replicas;
