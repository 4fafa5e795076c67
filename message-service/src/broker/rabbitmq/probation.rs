//! What must not travel with others: queues that did not take what they were sent, and messages
//! that a channel was closed over.
//!
//! Both go one message at a time, on a connection of their own, because a queue that does not
//! answer can stop its whole connection. A queue that confirms a message is healthy again.

use std::sync::Arc;
use std::time::Duration;

use super::RabbitMq;
use super::declare::{self, Declared};
use super::flight::{Carrier, Flight};
use super::link::Opened;
use super::queues::Health;
use crate::pass::Trouble;
use crate::store::Lane;

/// The wait before the first try; it doubles. By then what the queue refused is due again, so
/// that there is something to try it with.
const FIRST_TRY: Duration = Duration::from_millis(1_500);
/// The longest wait between two tries.
const SLOWEST_TRY: Duration = Duration::from_secs(4);
/// How often it is looked for messages that must go alone.
const LOOK: Duration = Duration::from_secs(1);

impl RabbitMq {
    /// Says why a queue is left out, and starts to try it.
    pub(super) fn on_probation(self: &Arc<Self>, subscription: &str, reason: &str) {
        tracing::warn!(
            subscription,
            reason,
            "nothing more is sent to {subscription} until its queue takes a message: {reason}"
        );
        let rabbit = Arc::clone(self);
        let subscription = subscription.to_owned();
        self.tasks.spawn(async move {
            rabbit.try_until_healthy(&subscription).await;
        });
    }

    async fn try_until_healthy(self: &Arc<Self>, subscription: &str) {
        let mut wait = FIRST_TRY;
        let mut carrier = None;
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(SLOWEST_TRY);
            let opened = tokio::select! {
                () = self.draining.cancelled() => return,
                opened = self.probation.ready() => opened,
            };
            let on_probation = |health: &Health| matches!(health, Health::Probation(_));
            let still = |reason| {
                let state = Health::Probation(reason);
                self.queues.turn(subscription, on_probation, state)
            };
            match self.try_once(subscription, &opened, &mut carrier).await {
                Ok(()) => {
                    if self.queues.turn(subscription, on_probation, Health::Open) {
                        tracing::info!(subscription, "{subscription} takes messages again");
                        self.wake();
                    }
                    return;
                }
                // The subscription is not in the topology any more.
                Err(reason) if !still(reason.clone()) => return,
                Err(_) => {}
            }
        }
    }

    /// Ok if the queue takes messages, as far as that can be known.
    async fn try_once(
        self: &Arc<Self>,
        subscription: &str,
        opened: &Arc<Opened>,
        carrier: &mut Option<Carrier>,
    ) -> Result<(), String> {
        let queue = self.names.queue(subscription);
        match declare::queue(opened, &queue).await {
            Ok(Declared::Exists) => {}
            Ok(Declared::Differs(why)) => return Err(why),
            Err(error) => return Err(error.to_string()),
        }
        if self.queues.reserve(subscription, 1) == 0 {
            // Full by our own count: the lanes wait until there is room.
            return Ok(());
        }
        let normal = Lane::Normal {
            limit: 1,
            max_bytes: 1,
        };
        let claimed = self.claim(subscription, normal).await;
        let loaded = match claimed {
            Ok((loaded, _)) if !loaded.is_empty() => loaded,
            claimed => {
                self.queues.landed(subscription, 1, 0);
                // Without anything to try it with, the lanes will see.
                return claimed.map(|_| ()).map_err(|error| error.to_string());
            }
        };
        let usable = carrier.take().filter(Carrier::is_usable);
        let ready = match usable {
            Some(carrier) => carrier,
            None => match Carrier::open(Arc::clone(opened)).await {
                Ok(carrier) => carrier,
                Err(error) => {
                    self.give_back(loaded).await;
                    return Err(error.to_string());
                }
            },
        };
        let tag = self.tag(subscription);
        let flight = Flight::start(self, &self.probation, tag, ready, loaded).await;
        let landed = flight.land().await;
        *carrier = landed.carrier;
        landed.trouble.map_or(Ok(()), Err)
    }

    /// Sends what must go alone, one after the other, until the broker drains.
    pub(super) async fn send_alone(self: Arc<Self>) {
        let mut carrier = None;
        let mut trouble = Trouble::new("sending suspect deliveries");
        loop {
            for subscription in self.queues.alone() {
                while self
                    .one_alone(&subscription, &mut carrier, &mut trouble)
                    .await
                {}
            }
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = self.alone.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// True if there may be another.
    async fn one_alone(
        self: &Arc<Self>,
        subscription: &str,
        carrier: &mut Option<Carrier>,
        trouble: &mut Trouble,
    ) -> bool {
        if self.draining.is_cancelled() || !self.queues.is_open(subscription) {
            return false;
        }
        let opened = tokio::select! {
            () = self.draining.cancelled() => return false,
            opened = self.probation.ready() => opened,
        };
        if self.queues.reserve(subscription, 1) == 0 {
            return false;
        }
        let claimed = trouble.note(self.claim(subscription, Lane::Alone).await);
        let loaded = claimed.map(|(loaded, _)| loaded).unwrap_or_default();
        if loaded.is_empty() {
            self.queues.landed(subscription, 1, 0);
            return false;
        }
        let usable = carrier.take().filter(Carrier::is_usable);
        let ready = match usable {
            Some(carrier) => Some(carrier),
            None => trouble.note(Carrier::open(opened).await),
        };
        let Some(ready) = ready else {
            self.give_back(loaded).await;
            return false;
        };
        let tag = self.tag(subscription);
        let flight = Flight::start(self, &self.probation, tag, ready, loaded).await;
        *carrier = flight.land().await.carrier;
        true
    }
}
