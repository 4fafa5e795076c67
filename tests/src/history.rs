//! What was asked while faults went on, and what is known of each: ok, failed, or unknown.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use payment::client::{PayResponse, PaymentStatus};
use tonic::Status;

use crate::books::Books;
use crate::clients::{Payments, orders};

/// Orders that are asked for at the same time.
const CONCURRENT: usize = 8;
/// Orders of one name, at most.
const MOST: usize = 100_000;
/// Then the next one is asked for this much later, so that a run of minutes is not about millions.
const PAUSE: Duration = Duration::from_millis(100);

/// How a request ended for who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It was done.
    Ok,
    /// It was refused, for good.
    Failed,
    /// It may have been done, or be done yet: a time-out, a lost connection, or PROCESSING.
    Unknown,
}

/// How many orders ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// PAID.
    pub ok: usize,
    /// REFUSED.
    pub failed: usize,
    /// Nobody told.
    pub unknown: usize,
}

/// Orders that were asked for once each, and what the merchant was told.
#[derive(Clone, Debug, Default)]
pub struct History {
    orders: BTreeMap<String, Outcome>,
}

impl History {
    /// Takes note of one answer, or of none.
    pub fn note(&mut self, order: &str, answer: &Result<PayResponse, Status>) {
        let outcome = match answer.as_ref().map(PayResponse::status) {
            Ok(PaymentStatus::Paid) => Outcome::Ok,
            Ok(PaymentStatus::Refused) => Outcome::Failed,
            Ok(_) | Err(_) => Outcome::Unknown,
        };
        let before = self.orders.insert(order.to_owned(), outcome);
        assert!(before.is_none(), "order {order} was asked for twice");
    }

    /// How many ended how.
    pub fn outcomes(&self) -> Outcomes {
        let count = |wanted| self.orders.values().filter(|o| **o == wanted).count();
        Outcomes {
            ok: count(Outcome::Ok),
            failed: count(Outcome::Failed),
            unknown: count(Outcome::Unknown),
        }
    }

    /// What was told is what happened: the databases agree about every order with a known
    /// outcome, and know no order that nobody asked for. What is unknown is all or nothing, which
    /// [`Books::hold`] says of every order.
    pub fn agrees_with(&self, books: &Books) {
        let paid: BTreeSet<_> = books.done.iter().map(|done| &done.order_id).collect();
        for (order, outcome) in &self.orders {
            match outcome {
                Outcome::Ok => assert!(paid.contains(order), "order {order} was not paid"),
                Outcome::Failed => assert!(!paid.contains(order), "order {order} was paid"),
                Outcome::Unknown => {}
            }
        }
        for order in paid {
            assert!(self.orders.contains_key(order), "who asked for {order}?");
        }
    }
}

/// Merchants that ask once for each order, and go away if they are not told.
#[derive(Debug)]
pub struct Merchants {
    payments: Payments,
    history: RefCell<History>,
    over: Cell<bool>,
}

impl Merchants {
    /// They ask there.
    pub fn of(payments: Payments) -> Self {
        Self {
            payments,
            history: RefCell::default(),
            over: Cell::new(false),
        }
    }

    /// Asks for orders of this name, some at a time, until told to [`stop`](Self::stop); every
    /// fifth cannot be paid.
    pub async fn ask(&self, name: &str) {
        self.over.set(false);
        let asked = stream::iter(orders(name, MOST))
            .take_while(|_| future::ready(!self.over.get()))
            .map(|order| async move {
                let answer = self.payments.asks(&order).await;
                self.history.borrow_mut().note(&order.id, &answer);
                tokio::time::sleep(PAUSE).await;
            });
        asked.buffer_unordered(CONCURRENT).collect::<()>().await;
    }

    /// No new order is asked for.
    pub fn stop(&self) {
        self.over.set(true);
    }

    /// What they were told.
    pub fn into_history(self) -> History {
        self.history.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;
    use crate::books::Done;

    fn told(status: PaymentStatus) -> Result<PayResponse, Status> {
        Ok(PayResponse {
            status: status.into(),
            ..PayResponse::default()
        })
    }

    fn paid(orders: &[&str]) -> Books {
        let done = |order: &&str| Done {
            message_id: order.as_bytes().to_vec(),
            order_id: (*order).to_owned(),
            at: 0,
        };
        Books {
            done: orders.iter().map(done).collect(),
            ..Books::default()
        }
    }

    #[test]
    fn what_is_known_must_have_happened_and_what_is_unknown_may() {
        let mut history = History::default();
        history.note("a", &told(PaymentStatus::Paid));
        history.note("b", &told(PaymentStatus::Refused));
        history.note("c", &told(PaymentStatus::Processing));
        history.note("d", &Err(Status::unavailable("away")));
        let outcomes = Outcomes {
            ok: 1,
            failed: 1,
            unknown: 2,
        };
        assert_eq!(history.outcomes(), outcomes);
        history.agrees_with(&paid(&["a"]));
        history.agrees_with(&paid(&["a", "c", "d"]));
        for wrong in [&["c"][..], &["a", "b"], &["a", "e"]] {
            let books = paid(wrong);
            assert!(catch_unwind(|| history.agrees_with(&books)).is_err());
        }
    }
}
