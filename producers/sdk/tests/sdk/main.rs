//! The SDK against a service that runs in this process and can be told to misbehave.

mod scripted;
mod status;
mod transact;
mod verbs;
mod world;
