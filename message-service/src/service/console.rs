//! What operators read. Nothing here changes anything.

use std::sync::Arc;

use super::gate::Permit;
use super::timeline::{self, TimelineEntry};
use super::{
    DeliveryCursor, DeliveryState, DeliveryView, Error, MessageFilter, MessageId, MessageView,
    ReplicaView, Service, SubscriptionCounts, limits,
};
use crate::broker::{AnswerState, BrokerState, QueueState};
use crate::message::Invalid;
use crate::store;

/// Rows of one page, at most.
const PAGE_ROWS: u32 = 500;
/// Rows of one page, if the caller does not say.
const DEFAULT_PAGE_ROWS: u32 = 100;

/// How many of what, and who is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CountsView {
    /// What the store counted.
    pub store: store::Counts,
    /// For each subscription of the store's list: how many consumers are connected.
    pub consumers: Vec<u32>,
    /// For each subscription of the store's list: what is known of its queue.
    pub queues: Vec<QueueState>,
    /// Whether deliveries can be carried.
    pub broker: BrokerState,
    /// How it is with the answers that come by way of the broker.
    pub answers: AnswerState,
    /// For each producer of the store's list: whether it did not answer when last asked.
    pub unreachable: Vec<bool>,
}

/// Everything about one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownMessage {
    /// The message.
    pub message: MessageView,
    /// Its deliveries by subscription.
    pub deliveries: Vec<DeliveryView>,
    /// What happened, in order of time.
    pub timeline: Vec<TimelineEntry>,
    /// Headers and payload, if they were asked for.
    pub body: Option<Body>,
}

/// Headers in the producer's order, and the payload.
pub type Body = (Vec<(String, String)>, Vec<u8>);

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T, C> {
    /// The rows.
    pub rows: Vec<T>,
    /// Where the next page begins; `None` on the last one.
    pub next: Option<C>,
}

impl Service {
    /// How many of what.
    pub async fn counts(self: &Arc<Self>) -> Result<CountsView, Error> {
        let permit = self.console.admit(1)?;
        let service = Arc::clone(self);
        let mut counts = self
            .read(permit, async move { service.store.counts().await })
            .await?;
        self.add_what_only_the_topology_knows(&mut counts);
        let consumers = |subscription: &SubscriptionCounts| {
            self.broker.consumers(&subscription.name).unwrap_or(0)
        };
        let queue = |subscription: &SubscriptionCounts| {
            self.broker.queue(&subscription.name).unwrap_or_default()
        };
        let unreachable =
            |(producer, _): &(String, u64)| self.reachability.is_unreachable(producer);
        Ok(CountsView {
            consumers: counts.subscriptions.iter().map(consumers).collect(),
            queues: counts.subscriptions.iter().map(queue).collect(),
            broker: self.broker.state(),
            answers: self.broker.answers(),
            unreachable: counts.producers.iter().map(unreachable).collect(),
            store: counts,
        })
    }

    /// The processes on this store.
    pub async fn replicas(self: &Arc<Self>) -> Result<Vec<ReplicaView>, Error> {
        let permit = self.console.admit(1)?;
        let service = Arc::clone(self);
        self.read(permit, async move { service.store.replicas().await })
            .await
    }

    /// Everything about one message.
    pub async fn show(
        self: &Arc<Self>,
        id: MessageId,
        with_body: bool,
    ) -> Result<ShownMessage, Error> {
        let permit = self.console.admit(1)?;
        let service = Arc::clone(self);
        let shown = self
            .read(
                permit,
                async move { service.store.show(id, with_body).await },
            )
            .await?
            .ok_or(Error::UnknownMessage(id))?;
        Ok(ShownMessage {
            timeline: timeline::of(&shown),
            message: shown.message,
            deliveries: shown.deliveries,
            body: shown.body,
        })
    }

    /// A page of messages by id.
    pub async fn list_messages(
        self: &Arc<Self>,
        filter: MessageFilter,
        after: Option<MessageId>,
        page_size: u32,
    ) -> Result<Page<MessageView, MessageId>, Error> {
        let limit = page_rows(page_size)?;
        let permit = self.console.admit(1)?;
        let service = Arc::clone(self);
        let rows = self
            .read(permit, async move {
                service.store.list_messages(filter, after, limit + 1).await
            })
            .await?;
        Ok(page(rows, limit, |row| row.id))
    }

    /// A page of deliveries by subscription and id.
    pub async fn list_deliveries(
        self: &Arc<Self>,
        state: DeliveryState,
        subscription: Option<String>,
        after: Option<DeliveryCursor>,
        page_size: u32,
    ) -> Result<Page<DeliveryView, DeliveryCursor>, Error> {
        let limit = page_rows(page_size)?;
        if let Some(name) = &subscription {
            limits::name("subscription", name)?;
        }
        let permit = self.console.admit(1)?;
        let service = Arc::clone(self);
        let (name, from_start) = (subscription.clone(), after.is_none());
        let rows = self
            .read(permit, async move {
                let name = name.as_deref();
                service
                    .store
                    .list_deliveries(state, name, after, limit + 1)
                    .await
            })
            .await?;
        match subscription {
            // A removed subscription is listed while it has rows, so only an empty list can
            // come from a name that nobody ever declared.
            Some(name)
                if from_start
                    && rows.is_empty()
                    && !self.topology.get().subscriptions.contains_key(&name) =>
            {
                Err(Error::UnknownSubscription(name))
            }
            Some(_) | None => Ok(page(rows, limit, |row| (row.subscription.clone(), row.id))),
        }
    }

    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        permit: Permit,
        work: impl Future<Output = Result<T, store::Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let service = Arc::clone(self);
        self.detached(async move {
            let _permit = permit;
            work.await.map_err(|error| service.failed(error))
        })
        .await
    }

    /// A store that lists only parties with rows would hide who is idle, or never came.
    fn add_what_only_the_topology_knows(&self, counts: &mut store::Counts) {
        let topology = self.topology.get();
        for (name, subscription) in &topology.subscriptions {
            if !counts.subscriptions.iter().any(|known| known.name == *name) {
                counts.subscriptions.push(SubscriptionCounts {
                    name: name.clone(),
                    topic: subscription.topic.clone(),
                    active: true,
                    ..SubscriptionCounts::default()
                });
            }
        }
        for name in topology.producers.keys() {
            if !counts.producers.iter().any(|(known, _)| known == name) {
                counts.producers.push((name.clone(), 0));
            }
        }
        counts.subscriptions.sort_by(|a, b| a.name.cmp(&b.name));
        counts.producers.sort();
    }
}

fn page_rows(page_size: u32) -> Result<usize, Error> {
    match page_size {
        0 => Ok(DEFAULT_PAGE_ROWS as usize),
        1..=PAGE_ROWS => Ok(page_size as usize),
        more => {
            Err(Invalid::too_large("page_size", more as usize, PAGE_ROWS as usize, "rows").into())
        }
    }
}

/// One row more than the page has was read, to know whether there is another page.
fn page<T, C>(mut rows: Vec<T>, limit: usize, cursor: impl Fn(&T) -> C) -> Page<T, C> {
    let more = rows.len() > limit;
    rows.truncate(limit);
    Page {
        next: rows.last().filter(|_| more).map(cursor),
        rows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_is_the_last_row_shown_and_only_if_there_are_more() {
        let identity = |row: &u32| *row;
        assert_eq!(page(vec![1, 2, 3], 2, identity).next, Some(2));
        assert_eq!(page(vec![1, 2, 3], 2, identity).rows, [1, 2]);
        assert_eq!(page(vec![1, 2], 2, identity).next, None);
        assert_eq!(page(Vec::new(), 2, identity).next, None);
    }

    #[test]
    fn a_page_has_100_rows_unless_asked_and_500_at_most() {
        assert_eq!(page_rows(0), Ok(100));
        assert_eq!(page_rows(500), Ok(500));
        page_rows(501).unwrap_err();
    }
}
