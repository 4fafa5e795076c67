//! The real binary: what it refuses, what it says, how it starts and how it ends.

mod migrate;
mod process;
mod refusals;
mod signals;
mod start;
