//! Business stories that must come out right, on real processes and real databases.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

mod accounting_is_away;
mod broken_data;
mod by_hand;
mod fence;
mod guide_commands;
mod order_from_balance;
mod payment_completed;
mod payout;
mod same_request;
mod sent_is_there;
mod stall;
mod states;
mod status_endpoints;
mod two_jobs;
mod vanishing_clients;
