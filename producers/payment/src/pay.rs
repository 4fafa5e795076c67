//! What `Pay` means: one deduction per order, and never a guess.

use std::time::Duration;

use handfast_producer::{Message, Outcome, Producer, TransactError};
use serde::Serialize;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::order_locks::{OrderLock, OrderLocks};
use crate::store::{Order, Payment, Records, State, Unpaid};

/// A payment that takes longer is left to the job, unless told otherwise.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// The topic that tells of a payment.
pub const TOPIC: &str = "payment.completed";

/// The payload of [`TOPIC`], as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Completed<'a> {
    /// The merchant.
    pub caller: &'a str,
    /// The merchant's name for the order.
    pub order_id: &'a str,
    /// Who paid.
    pub user: &'a str,
    /// In minor units.
    pub amount: i64,
}

/// Why a request gets no payment.
#[derive(Debug, thiserror::Error)]
pub enum PayError {
    /// The order is known with another amount or user.
    #[error("order `{order_id}` of `{caller}` exists with another amount or user")]
    Differs {
        /// The merchant.
        caller: String,
        /// The order.
        order_id: String,
    },
    /// The database did not answer; nothing is known about this request.
    #[error("cannot store the payment: {0}")]
    Database(#[from] sqlx::Error),
}

/// Everything that pays: the API and the job share it.
#[derive(Clone, Debug)]
pub struct Payments<S> {
    pub(crate) store: S,
    producer: Producer,
    locks: OrderLocks,
    /// Payments that go on though their caller may be gone.
    pub(crate) tasks: TaskTracker,
    /// After this the job may work on a payment that nobody else works on.
    pub(crate) job_after: Duration,
    give_up_after: Duration,
}

impl<S: Records> Payments<S> {
    /// Pays from `store` and tells by `producer`. A payment is left to its call for
    /// `job_after`, then the job may take it.
    pub fn new(store: S, producer: Producer, job_after: Duration) -> Self {
        Self {
            store,
            producer,
            locks: OrderLocks::default(),
            tasks: TaskTracker::new(),
            job_after,
            give_up_after: GIVE_UP_AFTER,
        }
    }

    /// The same with another time (default 60 s) after which a payment that hangs is given up
    /// and left to the job.
    #[must_use]
    pub fn giving_up_after(mut self, limit: Duration) -> Self {
        self.give_up_after = limit;
        self
    }

    /// Stores the request, or finds what a request before it has stored.
    pub async fn accept(
        &self,
        order: &Order,
        user: &str,
        amount: i64,
    ) -> Result<Payment, PayError> {
        let payment = self
            .store
            .accept(order, user, amount, self.job_after)
            .await?;
        if payment.user != user || payment.amount != amount {
            return Err(PayError::Differs {
                caller: order.caller.clone(),
                order_id: order.order_id.clone(),
            });
        }
        Ok(payment)
    }

    /// Finishes a payment that is PAYING, and returns what is then stored: PAYING again if it
    /// is not known what became of it, or if it could not be tried.
    pub async fn finish(&self, order: &Order) -> Result<State, sqlx::Error> {
        let finish = async {
            let lock = self.locks.lock(order).await;
            self.finish_locked(order, lock).await
        };
        self.in_time(order, finish).await
    }

    /// Like [`finish`](Self::finish), but None if a call works on the order.
    pub async fn finish_if_idle(&self, order: &Order) -> Option<Result<State, sqlx::Error>> {
        let lock = self.locks.try_lock(order)?;
        Some(self.in_time(order, self.finish_locked(order, lock)).await)
    }

    /// Gives up what hangs, so that it holds neither the order nor a place among those in
    /// flight. Dropped before its commit a payment is rolled back, dropped later it goes on.
    async fn in_time(
        &self,
        order: &Order,
        finish: impl Future<Output = Result<State, sqlx::Error>>,
    ) -> Result<State, sqlx::Error> {
        timeout(self.give_up_after, finish)
            .await
            .unwrap_or_else(|_| {
                tracing::warn!(
                    caller = order.caller,
                    order = order.order_id,
                    "a payment hangs; it will be tried again"
                );
                Ok(State::Paying)
            })
    }

    async fn finish_locked(&self, order: &Order, _lock: OrderLock) -> Result<State, sqlx::Error> {
        // Who had the lock before may have finished it.
        let payment = self.stored(order).await?;
        if payment.state != State::Paying {
            return Ok(payment.state);
        }
        let try_id = Uuid::now_v7();
        self.store.note_try(try_id, order).await?;
        let paid = self
            .producer
            .transact(self.store.writer(), completed(&payment), async |tx| {
                S::pay(tx, try_id, &payment).await
            })
            .await;
        match paid {
            Ok(Outcome::Committed(())) => return Ok(State::Paid),
            Ok(Outcome::AlreadyCommitted) => {}
            Err(TransactError::Business(Unpaid::InsufficientBalance)) => {
                let reason = Unpaid::InsufficientBalance.to_string();
                self.store.refuse(order, &reason).await?;
            }
            Err(TransactError::Business(Unpaid::NotPaying)) => {}
            Err(error) => tracing::warn!(
                caller = order.caller,
                order = order.order_id,
                %error,
                "a payment is not finished; it will be tried again"
            ),
        }
        Ok(self.stored(order).await?.state)
    }

    async fn stored(&self, order: &Order) -> Result<Payment, sqlx::Error> {
        self.store
            .find(order)
            .await?
            .ok_or(sqlx::Error::RowNotFound)
    }
}

fn completed(payment: &Payment) -> Message {
    let Order { caller, order_id } = &payment.order;
    let payload = Completed {
        caller,
        order_id,
        user: &payment.user,
        amount: payment.amount,
    };
    // No caller contains a slash, so two orders never share a key.
    let message = Message::new(TOPIC).key(format!("{caller}/{order_id}"));
    #[expect(
        clippy::expect_used,
        reason = "strings and an integer can always be written as JSON"
    )]
    message.json(&payload).expect("plain fields become JSON")
}
