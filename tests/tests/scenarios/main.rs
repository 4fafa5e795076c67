//! Business stories that must come out right, on real processes and real databases.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod fence;
mod payment_completed;
mod status_endpoints;
