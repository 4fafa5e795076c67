//! The producer's side of Handfast: a message goes out if, and only if, the business
//! transaction committed.
//!
//! [`Producer::transact`] hands the message over before the transaction, runs the business
//! and a row of the [`fence`] in one transaction, and confirms after the commit.
//! Whatever is lost on the way is settled by Handfast asking the [`StatusServer`], which
//! answers from the fence. [`Producer::publish`] is for facts that are already true.
//!
//! ```no_run
//! use handfast_producer::{Message, Outcome, Producer, StatusServer, Tx, migrate};
//! use sqlx::{Sqlite, SqliteConnection};
//! use tokio_util::sync::CancellationToken;
//!
//! async fn pay(db: &mut SqliteConnection, order: i64) -> Result<i64, sqlx::Error> {
//!     sqlx::query("UPDATE orders SET paid = 1 WHERE id = ?").bind(order).execute(db).await?;
//!     Ok(order)
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let pool = sqlx::SqlitePool::connect("sqlite:orders.db").await?;
//!     migrate(&pool).await?;
//!
//!     let shutdown = CancellationToken::new();
//!     let status = StatusServer::new().fence(pool.clone());
//!     let serving = tokio::spawn(status.serve("127.0.0.1:7411".parse()?, shutdown.clone()));
//!
//!     let producer = Producer::connect("http://127.0.0.1:7400", "orders").await?;
//!     let message = Message::new("order.paid").key("42").json(&42)?;
//!     match producer.transact(&pool, message, async |tx| pay(tx, 42).await).await? {
//!         Outcome::Committed(order) => println!("order {order} is paid"),
//!         Outcome::AlreadyCommitted => println!("order 42 was paid before"),
//!     }
//!
//!     // The same from a task of its own.
//!     let (again, orders) = (producer.clone(), pool.clone());
//!     let paid = tokio::spawn(async move {
//!         let message = Message::new("order.paid").key("43");
//!         again
//!             .transact(&orders, message, async |tx: &mut Tx<Sqlite>| {
//!                 println!("try {}", tx.message_id());
//!                 sqlx::query("INSERT INTO log (what) VALUES ('43')").execute(&mut **tx).await?;
//!                 pay(tx, 43).await
//!             })
//!             .await
//!     });
//!     paid.await??;
//!
//!     // Before the process ends: wait for confirms that are still on their way.
//!     producer.drain().await;
//!     shutdown.cancel();
//!     serving.await??;
//!     Ok(())
//! }
//! ```
//!
//! The same on PostgreSQL. The closure works at the isolation level of its pool; the SDK makes
//! the commit durable, and asks its own questions at READ COMMITTED:
//!
//! ```no_run
//! use handfast_producer::{Message, Producer, StatusServer, Tx, migrate};
//! use sqlx::{PgConnection, PgPool, Postgres};
//! use tokio_util::sync::CancellationToken;
//!
//! async fn pay(db: &mut PgConnection, order: i64) -> Result<i64, sqlx::Error> {
//!     sqlx::query("UPDATE orders SET paid = true WHERE id = $1").bind(order).execute(db).await?;
//!     Ok(order)
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let pool = PgPool::connect("postgres://shop@localhost/orders").await?;
//!     migrate(&pool).await?;
//!
//!     let shutdown = CancellationToken::new();
//!     let status = StatusServer::new().fence(pool.clone());
//!     let serving = tokio::spawn(status.serve("127.0.0.1:7411".parse()?, shutdown.clone()));
//!
//!     let producer = Producer::connect("http://127.0.0.1:7400", "orders").await?;
//!     let message = Message::new("order.paid").key("42").json(&42)?;
//!     producer.transact(&pool, message, async |tx| pay(tx, 42).await).await?;
//!
//!     // The same from a task of its own.
//!     let (again, orders) = (producer.clone(), pool.clone());
//!     let paid = tokio::spawn(async move {
//!         let message = Message::new("order.paid").key("43");
//!         again
//!             .transact(&orders, message, async |tx: &mut Tx<Postgres>| {
//!                 sqlx::query("INSERT INTO log (what) VALUES ('43')").execute(&mut **tx).await?;
//!                 pay(tx, 43).await
//!             })
//!             .await
//!     });
//!     paid.await??;
//!
//!     producer.drain().await;
//!     shutdown.cancel();
//!     serving.await??;
//!     Ok(())
//! }
//! ```
//!
//! Reading order: [`message`], [`client`], [`transact`], [`Tx`], [`fence`], [`status`].

mod batch;
mod bounded;
pub mod client;
mod endpoints;
pub mod error;
pub mod fence;
#[doc(hidden)]
pub mod incoming;
pub mod message;
mod pace;
pub mod status;
pub mod transact;
mod tx;
mod verbs;

pub use client::Producer;
pub use error::{CallError, ConnectError, Refusal, TransactError};
pub use fence::{Fence, FenceDatabase, FenceError, FenceIdentity, Settled, migrate};
pub use handfast_proto as proto;
pub use message::Message;
pub use status::{Answer, BusinessStatus, Question, StatusServer, StatusServerError};
pub use transact::Outcome;
pub use tx::Tx;

/// The guide's examples, so that they compile as long as the guide is true.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide/producer.md")]
pub struct Guide;
