//! Reference service: pays orders from balances.
//!
//! A merchant, the *caller*, asks to have an order paid by a user. One transaction takes the
//! amount from the user's balance, credits the merchant, and marks the order paid; the message
//! `payment.completed` goes out if, and only if, it commits.
//!
//! The promises: one deduction per order, however often and however concurrently a request is
//! repeated; the answer is PAID, REFUSED or PROCESSING, and never "failed" for what is not
//! known; what a crash leaves unfinished is finished by the next call or by the job.
//!
//! Reading order: [`options`], [`database`], [`store`], [`pay`], [`job`], [`api`], [`run`](fn@run).

pub mod api;
pub mod database;
mod input;
pub mod job;
pub mod options;
mod order_locks;
pub mod pay;
pub mod run;
pub mod store;

pub use database::Database;
pub use options::Options;
pub use run::{Error, run, serve};
pub use store::open_accounts;
pub use store::sqlite::{open_account, open_database};

/// The contract `payment/v1/payment.proto`; `tests/contract.rs` proves that it is current.
pub mod v1 {
    #![expect(
        missing_docs,
        clippy::allow_attributes,
        reason = "generated; the .proto file carries the documentation"
    )]
    include!("gen/payment.v1.rs");
}

/// What a client of this service needs.
pub mod client {
    pub use crate::v1::payment_client::PaymentClient;
    pub use crate::v1::{
        GetPaymentRequest, GetPaymentResponse, PayRequest, PayResponse, PaymentStatus,
    };
}
