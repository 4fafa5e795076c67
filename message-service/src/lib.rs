//! The standalone message service of Handfast.
//!
//! In reading order: [`message`] (what may become of a message; pure) · [`topology`] ·
//! [`store`] (port) · [`producer`] (port: what became of it?) · [`broker`] (how deliveries
//! reach consumers) · [`service`] (the verbs) · [`look`] (what is due?) · [`checker`],
//! [`recovery`], [`retention`] (the passes) · [`api`] (gRPC) · [`config`] · [`serve`] (wiring).

pub mod answered;
pub mod api;
pub mod broker;
pub mod checker;
pub mod clock;
pub mod config;
pub mod look;
pub mod message;
pub mod pass;
pub mod presence;
pub mod producer;
pub mod recovery;
pub mod refresh;
pub mod retention;
pub mod serve;
pub mod service;
pub mod store;
pub mod telemetry;
pub mod topology;
pub mod turn;

#[cfg(test)]
mod world;
