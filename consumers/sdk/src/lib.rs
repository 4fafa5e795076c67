//! The consumer SDK of Handfast: a message may be delivered more often, its effect happens once.
//!
//! A consumer names its source, its subscription and the database that holds its inbox, and
//! gives a handler. The SDK inserts a row per message into the inbox, lets the handler write
//! its effect in the same transaction, commits, and only then answers. A message that comes
//! again finds its inbox row and is answered CONSUMED without the handler.
//!
//! ```no_run
//! use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, Tx, handfast};
//! use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
//! use tokio_util::sync::CancellationToken;
//!
//! struct Accounting;
//!
//! impl BatchHandler for Accounting {
//!     async fn handle_batch(&self, tx: &mut Tx, messages: &[Delivered]) -> Vec<Answer> {
//!         for message in messages {
//!             let booked = sqlx::query("INSERT INTO voucher (message_id) VALUES (?)")
//!                 .bind(message.message_id.as_bytes().as_slice())
//!                 .execute(&mut *tx)
//!                 .await;
//!             if let Err(error) = booked {
//!                 // Nothing of the batch stays; each message gets its turn alone.
//!                 return vec![Answer::failed(error); messages.len()];
//!             }
//!         }
//!         vec![Answer::Consumed; messages.len()]
//!     }
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let file = SqliteConnectOptions::new()
//!         .filename("accounting.db")
//!         .create_if_missing(true)
//!         .journal_mode(SqliteJournalMode::Wal);
//!     let pool = SqlitePoolOptions::new().connect_with(file).await?;
//!     let shutdown = CancellationToken::new();
//!
//!     let report = Consumer::connect(handfast("http://127.0.0.1:7400"))
//!         .await?
//!         .subscription("payment.completed", "accounting")
//!         .inbox(pool)
//!         .run_batch(Accounting, shutdown)
//!         .await?;
//!     println!("{} effects", report.consumed);
//!     Ok(())
//! }
//! ```
//!
//! The same inside of a spawned task, with one message per transaction:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use handfast_consumer::{Answer, Consumer, Delivered, Error, Handler, Report, Tx, handfast};
//! use tokio::task::JoinHandle;
//! use tokio_util::sync::CancellationToken;
//!
//! struct Mailer;
//!
//! impl Handler for Mailer {
//!     async fn handle(&self, tx: &mut Tx, message: &Delivered) -> Answer {
//!         let queued = sqlx::query("INSERT INTO mail (payload) VALUES (?)")
//!             .bind(message.payload.as_ref())
//!             .execute(tx)
//!             .await;
//!         match queued {
//!             Ok(_) => Answer::Consumed,
//!             Err(_) => Answer::Later(Duration::from_secs(10)),
//!         }
//!     }
//! }
//!
//! fn start(pool: sqlx::SqlitePool, shutdown: CancellationToken) -> JoinHandle<Result<Report, Error>> {
//!     tokio::spawn(async move {
//!         Consumer::connect(handfast("http://127.0.0.1:7400"))
//!             .await?
//!             .subscription("order.shipped", "mailer")
//!             .inbox(pool)
//!             .run(Mailer, shutdown)
//!             .await
//!     })
//! }
//! ```
//!
//! With RabbitMQ and PostgreSQL:
//!
//! ```no_run
//! use handfast_consumer::{Answer, Consumer, Delivered, Handler, Tx, rabbitmq};
//! use sqlx::Postgres;
//! use tokio_util::sync::CancellationToken;
//!
//! struct Mailer;
//!
//! impl Handler<Postgres> for Mailer {
//!     async fn handle(&self, tx: &mut Tx<Postgres>, message: &Delivered) -> Answer {
//!         let queued = sqlx::query("INSERT INTO mail (message_id, payload) VALUES ($1, $2)")
//!             .bind(message.message_id)
//!             .bind(message.payload.as_ref())
//!             .execute(tx)
//!             .await;
//!         match queued {
//!             Ok(_) => Answer::Consumed,
//!             Err(error) => Answer::failed(error),
//!         }
//!     }
//! }
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = sqlx::PgPool::connect("postgres://postgres@127.0.0.1:5432/mailer").await?;
//! Consumer::connect(rabbitmq("amqp://guest:guest@127.0.0.1:5672/%2f"))
//!     .await?
//!     .subscription("order.shipped", "mailer")
//!     .inbox(pool)
//!     .run(Mailer, CancellationToken::new())
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! Parts start in any order: a service, broker, queue, topic, subscription or database that is
//! not there yet is waited for. After `shutdown` nothing new is asked for, what was delivered is worked off
//! and answered, and [`Subscriber::run`] returns its numbers.
//!
//! Reading order of the source: `consumer` (the builder) · `dispatch` (the loop) · `queue`
//! (what may run together) · `effect` (one transaction) · `inbox` · `source` (where deliveries
//! come from) · `guard` (states that must not be skipped).

mod backoff;
mod consumer;
mod dispatch;
mod effect;
mod error;
mod guard;
mod handler;
mod inbox;
mod message;
mod queue;
mod report;
mod source;

pub use consumer::{Consumer, MAX_BATCH, MAX_PREFETCH, Subscriber, Subscription};
pub use error::Error;
pub use guard::{Columns, Guard, GuardConnection, GuardError, Key, Transition, Unordered};
pub use handler::{BatchHandler, Handler};
pub use inbox::{InboxDatabase, Seal, Seen, Tx, migrate};
pub use message::{Answer, Delivered};
pub use report::Report;
pub use source::{RabbitMq, Source, handfast, rabbitmq};

/// The guide's examples, so that they compile as long as the guide is true.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide/consumer.md")]
pub struct Guide;
