//! What callers are told on bad days, over a real connection and a real SQLite file.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod bad_lists;
mod console;
mod consume;
mod deliveries;
mod messages;
mod pressure;
mod states;
mod world;
