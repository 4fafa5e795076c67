//! The SDK against a service that runs in this process and can be told to misbehave.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

mod asking;
mod postgres;
mod scripted;
mod several;
mod sqlite;
mod status;
mod transact;
mod verbs;
mod world;
