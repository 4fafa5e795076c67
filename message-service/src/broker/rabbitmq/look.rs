//! Looks at every queue once a second: makes those that are missing, and learns how much waits
//! in the others and who consumes them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};

use super::RabbitMq;
use super::declare::{self, Declared};
use super::error::Error;
use super::link::Opened;
use super::queues::Health;
use crate::pass::Trouble;

/// Looks at the same time.
const AT_A_TIME: usize = 16;
/// How often.
const PERIOD: Duration = Duration::from_secs(1);

impl RabbitMq {
    /// Looks until the broker stops.
    pub(super) async fn look(self: Arc<Self>) {
        let mut trouble = Trouble::new("looking at queues");
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                _ = tick.tick() => {}
            }
            self.to_remove(self.queues.follow(&self.topology.get()));
            self.queues.tick();
            let opened = tokio::select! {
                () = self.draining.cancelled() => return,
                opened = self.looking.ready() => opened,
            };
            trouble.note(self.look_at_all(&opened).await);
        }
    }

    /// One round. The first error is returned, and does not keep others from their turn.
    async fn look_at_all(&self, opened: &Arc<Opened>) -> Result<(), String> {
        if !*self.ours.borrow() {
            let marked = self.mark(opened).await;
            let why = match marked {
                Ok(Ok(())) => None,
                Ok(Err(refused)) => Some(refused.to_string()),
                Err(error) => Some(format!("queue {}: {error}", self.names.mark())),
            };
            if let Some(why) = why {
                for subscription in self.queues.which(|_| true) {
                    let shown = Health::Undeclared(why.clone());
                    self.queues.turn(&subscription, |_| true, shown);
                }
                return Err(why);
            }
        }
        for subscription in self.take_removed() {
            self.remove(opened, &subscription).await;
        }
        let mut first_error = None;
        let answers = self.names.acknowledge();
        match declare::look(opened, &answers).await {
            Ok(Some(seen)) => {
                self.answers_waiting(seen.waiting);
                (self.queues).shared_by(seen.consumers, self.clock.monotonic());
            }
            Ok(None) => {
                let made = declare::acknowledge(opened, &answers).await;
                first_error = wrong(made);
            }
            Err(error) => first_error = Some(error.to_string()),
        }
        first_error = first_error.map(|why| format!("queue {answers}: {why}"));
        if first_error.is_some() {
            // Not known to be none.
            self.answers_waiting(u64::MAX);
        }
        self.answers_trouble.looked(first_error.clone());
        // At the same time, because one that does not answer must not keep us from knowing how
        // full the others are.
        let looks = self.queues.to_look_at(self.clock.monotonic()).into_iter();
        let looks = looks.map(|subscription| self.look_at(opened, subscription));
        let looked: Vec<Result<(), String>> = stream::iter(looks)
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        let mut errors = looked.into_iter().filter_map(Result::err);
        first_error.or_else(|| errors.next()).map_or(Ok(()), Err)
    }

    async fn look_at(&self, opened: &Arc<Opened>, subscription: String) -> Result<(), String> {
        let subscription = subscription.as_str();
        let queue = self.names.queue(subscription);
        let undeclared = |health: &Health| matches!(health, Health::Undeclared(_));
        if !self
            .queues
            .which(undeclared)
            .iter()
            .any(|name| name == subscription)
        {
            match declare::look(opened, &queue).await {
                Ok(Some(seen)) => {
                    let now = self.clock.monotonic();
                    self.queues.seen(subscription, seen, now);
                    return Ok(());
                }
                // It was deleted; what was in it is found by its silence.
                Ok(None) => {
                    tracing::warn!(subscription, queue, "queue {queue} is missing and is made");
                    let missing = Health::Undeclared(format!("queue {queue} is missing"));
                    let open = |health: &Health| *health == Health::Open;
                    self.queues.turn(subscription, open, missing);
                }
                Err(error) => {
                    if matches!(error, Error::TimedOut { .. }) {
                        self.queues.silent(subscription, self.clock.monotonic());
                    }
                    return Err(format!("queue {queue}: {error}"));
                }
            }
        }
        let made = declare::queue(opened, &queue).await;
        match wrong(made) {
            None => {
                if self.queues.turn(subscription, undeclared, Health::Open) {
                    self.wake();
                }
                Ok(())
            }
            Some(why) => {
                let why = format!("queue {queue}: {why}");
                self.queues
                    .turn(subscription, undeclared, Health::Undeclared(why.clone()));
                Err(why)
            }
        }
    }

    /// Deletes the queue of a removed subscription if nobody loses anything by it.
    pub(super) async fn remove(&self, opened: &Arc<Opened>, subscription: &str) {
        let queue = self.names.queue(subscription);
        let removed = match declare::look(opened, &queue).await {
            Ok(None) => return,
            Ok(Some(seen)) if seen.waiting == 0 && seen.consumers == 0 => {
                declare::delete(opened, &queue).await
            }
            Ok(Some(seen)) => {
                tracing::warn!(
                    subscription,
                    queue,
                    waiting = seen.waiting,
                    consumers = seen.consumers,
                    "subscription {subscription} was removed, but its queue {queue} is in use and \
                     is kept; delete it when nobody needs it any more"
                );
                return;
            }
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => tracing::info!(subscription, queue, "queue {queue} was deleted"),
            Err(error) => tracing::warn!(
                subscription,
                queue,
                %error,
                "cannot delete queue {queue} of a removed subscription: {error}; delete it by hand"
            ),
        }
    }
}

/// Why a queue that was declared cannot be used.
fn wrong(declared: Result<Declared, Error>) -> Option<String> {
    match declared {
        Ok(Declared::Exists) => None,
        Ok(Declared::Differs(why)) => Some(why),
        Err(error) => Some(error.to_string()),
    }
}
