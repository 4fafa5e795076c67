//! One worker per order inside this process.
//!
//! It only saves work: between processes, and for correctness, the key in Handfast and the
//! state in the row decide.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::store::Order;

type Held = Mutex<HashMap<Order, Arc<AsyncMutex<()>>>>;

/// The orders that somebody works on or waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct OrderLocks {
    held: Arc<Held>,
}

/// The right to work on an order, until it is dropped.
#[derive(Debug)]
pub(crate) struct OrderLock {
    held: Arc<Held>,
    order: Order,
    guard: Option<OwnedMutexGuard<()>>,
}

impl OrderLocks {
    /// Waits for its turn.
    pub(crate) async fn lock(&self, order: &Order) -> OrderLock {
        let mutex = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(held.entry(order.clone()).or_default())
        };
        // Made first, so that an entry is also removed if this future is dropped.
        let mut lock = OrderLock {
            held: Arc::clone(&self.held),
            order: order.clone(),
            guard: None,
        };
        lock.guard = Some(mutex.lock_owned().await);
        lock
    }

    /// None if somebody works on the order.
    pub(crate) fn try_lock(&self, order: &Order) -> Option<OrderLock> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Entry::Vacant(vacant) = held.entry(order.clone()) else {
            return None;
        };
        let mutex = Arc::clone(vacant.insert(Arc::default()));
        let guard = mutex.try_lock_owned().ok();
        Some(OrderLock {
            held: Arc::clone(&self.held),
            order: order.clone(),
            guard,
        })
    }
}

impl Drop for OrderLock {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard = None;
        // Only the map's own handle is left: nobody works or waits.
        if held
            .get(&self.order)
            .is_some_and(|mutex| Arc::strong_count(mutex) == 1)
        {
            held.remove(&self.order);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(id: &str) -> Order {
        Order {
            caller: "shop".into(),
            order_id: id.into(),
        }
    }

    #[tokio::test]
    async fn an_order_has_one_worker_and_leaves_nothing_behind() {
        let locks = OrderLocks::default();
        let first = locks.lock(&order("1")).await;
        assert!(locks.try_lock(&order("1")).is_none());
        assert!(locks.try_lock(&order("2")).is_some());
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { drop(locks.lock(&order("1")).await) })
        };
        drop(first);
        waiting.await.unwrap();
        assert!(locks.held.lock().unwrap().is_empty());
    }
}
