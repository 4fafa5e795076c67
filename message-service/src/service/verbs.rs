//! The verbs of producers and consumers.

use std::sync::Arc;

use async_trait::async_trait;

use super::refusal::{self, HandOver};
use super::{
    Answer, AnswerOutcome, Answers, Error, Ids, Invalid, ItemResult, MessageEvent, MessageId,
    MessageState, NewMessage, Service, Status, Submission, limits,
};
use crate::broker::{AnswerSink, Permit};
use crate::store::{Decision, Written};
use crate::topology::Topology;

impl Service {
    /// Keeps messages until their transactions are decided.
    pub async fn prepare(
        self: &Arc<Self>,
        call: Submission,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        self.hand_over(HandOver::Prepare, call).await
    }

    /// Keeps messages whose facts are already true, and delivers them.
    pub async fn publish(
        self: &Arc<Self>,
        call: Submission,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        self.hand_over(HandOver::Publish, call).await
    }

    /// The transactions committed: deliver.
    pub async fn confirm(
        self: &Arc<Self>,
        call: Ids,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        self.decide(MessageEvent::Confirm, call).await
    }

    /// The transactions rolled back: forget.
    pub async fn cancel(
        self: &Arc<Self>,
        call: Ids,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        self.decide(MessageEvent::Cancel, call).await
    }

    /// What became of messages of this producer.
    pub async fn get(self: &Arc<Self>, call: Ids) -> Result<Vec<ItemResult<Status>>, Error> {
        refusal::list("message_ids", call.ids.len(), call.bytes)?;
        refusal::producer(&self.topology.get(), &call.producer)?;
        let permit = self.ending.admit(call.bytes)?;
        let service = Arc::clone(self);
        self.detached(async move {
            let _permit = permit;
            let (ids, places) = split(call.ids.into_iter().map(|id| id.map_err(Error::from)));
            let found = service.store.get(&call.producer, ids.clone()).await;
            let found = found.map_err(|error| service.failed(error))?;
            let answers = ids.into_iter().zip(found).map(|(id, found)| match found {
                Some((message, deliveries)) => Ok(Status {
                    message,
                    deliveries,
                }),
                None => Err(Error::UnknownMessage(id)),
            });
            service.merge("get", places, answers)
        })
        .await
    }

    /// Writes consumers' answers, one outcome each, in order.
    pub async fn acknowledge(
        self: &Arc<Self>,
        call: Answers,
    ) -> Result<Vec<ItemResult<AnswerOutcome>>, Error> {
        refusal::list("answers", call.answers.len(), call.bytes)?;
        if limits::name("subscription", &call.subscription).is_err() {
            // No subscription can have this name, so no delivery of it can exist.
            return Ok(nothing_known(call.answers));
        }
        refusal::answers_by_call(&self.topology.get(), &call.subscription)?;
        let permit = self.ending.admit(call.bytes)?;
        let service = Arc::clone(self);
        self.detached(async move {
            let _permit = permit;
            service.write_answers(call).await
        })
        .await
    }

    async fn hand_over(
        self: &Arc<Self>,
        verb: HandOver,
        call: Submission,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        refusal::list("messages", call.messages.len(), call.bytes)?;
        let topology = self.topology.get();
        refusal::producer(&topology, &call.producer)?;
        let permit = self.bodies.admit(call.bytes)?;
        let service = Arc::clone(self);
        self.detached(async move {
            let _permit = permit;
            let store = Arc::clone(&service.store);
            let backlog_bytes = || async move { store.backlog_bytes().await };
            let room = service.backlog.check(backlog_bytes).await;
            room.map_err(|error| service.failed(error))??;
            let messages = service.refuse_early(&topology, verb, &call.producer, call.messages)?;
            match verb {
                HandOver::Prepare => {
                    service
                        .write_prepared(&topology, &call.producer, messages)
                        .await
                }
                HandOver::Publish => service.write_published(messages).await,
            }
        })
        .await
    }

    /// What can be said without the store, item by item.
    fn refuse_early(
        &self,
        topology: &Topology,
        verb: HandOver,
        producer: &str,
        messages: Vec<Result<NewMessage, Invalid>>,
    ) -> Result<Vec<ItemResult<NewMessage>>, Error> {
        let producer = refusal::producer(topology, producer)?;
        let now = self.store.now();
        let check = |message: Result<NewMessage, Invalid>| {
            let message = message?;
            self.limits.check(&message, now)?;
            refusal::destination(topology, producer, verb, &message)?;
            Ok(message)
        };
        Ok(messages.into_iter().map(check).collect())
    }

    async fn write_prepared(
        &self,
        topology: &Topology,
        producer: &str,
        mut messages: Vec<ItemResult<NewMessage>>,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        let check_after = refusal::producer(topology, producer)?.checks.check_after;
        let wanted = messages.iter().filter(|message| message.is_ok()).count();
        let count = |most| self.store.undecided(producer, most);
        let room = self.undecided.reserve(producer, wanted, count).await;
        let room = room.map_err(|error| self.failed(error))?;
        refuse_beyond(&mut messages, room.granted(), || Error::TooManyUndecided {
            producer: producer.to_owned(),
            limit: self.max_undecided,
        });
        let (asked, places) = split(messages);
        let written = if asked.is_empty() {
            Ok(Written::default())
        } else {
            self.store.prepare(asked, check_after).await
        };
        let written = written.map_err(|error| self.failed(error))?;
        room.settle(written.items.iter().filter(|item| item.is_ok()).count());
        self.answer("prepare", places, written)
    }

    async fn write_published(
        &self,
        messages: Vec<ItemResult<NewMessage>>,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        let (asked, places) = split(messages);
        let mut written = Written::default();
        if !asked.is_empty() {
            let permit = self.broker.permit(asked.len());
            let published = self.store.publish(asked, permit.handoff()).await;
            written = published.map_err(|error| self.failed(error))?;
            self.send_at_once(permit, &mut written).await;
        }
        self.answer("publish", places, written)
    }

    async fn decide(
        self: &Arc<Self>,
        event: MessageEvent,
        call: Ids,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        refusal::list("message_ids", call.ids.len(), call.bytes)?;
        refusal::producer(&self.topology.get(), &call.producer)?;
        let permit = self.ending.admit(call.bytes)?;
        let service = Arc::clone(self);
        self.detached(async move {
            let _permit = permit;
            let decision = |id: Result<MessageId, Invalid>| Ok(Decision { id: id?, event });
            let (asked, places) = split(call.ids.into_iter().map(decision));
            let mut written = Written::default();
            if !asked.is_empty() {
                let permit = match event {
                    MessageEvent::Confirm | MessageEvent::Publish => {
                        service.broker.permit(asked.len())
                    }
                    MessageEvent::Cancel | MessageEvent::Prepare => Permit::none(),
                };
                let decided = (service.store)
                    .decide(&call.producer, asked, permit.handoff())
                    .await;
                written = decided.map_err(|error| service.failed(error))?;
                service.send_at_once(permit, &mut written).await;
            }
            service.answer("decide", places, written)
        })
        .await
    }

    /// Hands what was leased to this process to the broker.
    async fn send_at_once(&self, permit: Permit, written: &mut Written) {
        let handed = std::mem::take(&mut written.handed);
        if !handed.is_empty() {
            self.broker.hand_over(permit, handed).await;
        }
    }

    async fn write_answers(&self, call: Answers) -> Result<Vec<ItemResult<AnswerOutcome>>, Error> {
        let Answers {
            subscription,
            answers,
            ..
        } = call;
        let (readable, places) = split(answers.into_iter().map(|item| item.map_err(Error::from)));
        let asked: Vec<Answer> = readable.iter().flatten().cloned().collect();
        let mut outcomes = Vec::new();
        if !asked.is_empty() {
            outcomes = self.record(&subscription, asked).await?;
        }
        let mut outcomes = outcomes.into_iter();
        let answers = readable.iter().map(|item| match item {
            Some(_) => outcomes
                .next()
                .ok_or_else(|| self.failures.of_program("too few outcomes of answers")),
            None => Ok(AnswerOutcome::NoSuchDelivery),
        });
        self.merge("acknowledge", places, answers.collect::<Vec<_>>())
    }

    /// Makes answers durable, then tells who waits for them.
    async fn record(
        &self,
        subscription: &str,
        answers: Vec<Answer>,
    ) -> Result<Vec<AnswerOutcome>, Error> {
        // A mark for a name that nobody declared would stay in memory for ever.
        let known = self.topology.get().subscriptions.contains_key(subscription);
        let waiting = known.then(|| self.answered.arrive(subscription));
        let asked: Vec<_> = answers
            .iter()
            .map(|answer| (answer.id, answer.sent_at))
            .collect();
        let outcomes = self.store.acknowledge(subscription, answers).await;
        let outcomes = outcomes.map_err(|error| self.failed(error))?;
        if let Some(waiting) = waiting {
            // An answer to something that was never sent here says nothing about how far the
            // subscription has come.
            let sent_at = asked
                .iter()
                .zip(&outcomes)
                .filter(|(_, outcome)| **outcome != AnswerOutcome::NoSuchDelivery)
                .filter_map(|((_, sent_at), _)| *sent_at)
                .max();
            waiting.recorded(sent_at, self.store.now());
        }
        let ids: Vec<MessageId> = asked.into_iter().map(|(id, _)| id).collect();
        self.broker.answered(subscription, &ids);
        Ok(outcomes)
    }

    /// Signals what became due, and gives each item its result.
    fn answer(
        &self,
        doing: &str,
        places: Vec<Result<(), Error>>,
        written: Written,
    ) -> Result<Vec<ItemResult<MessageState>>, Error> {
        if !written.topics.is_empty() {
            self.broker.due(&written.topics);
        }
        let items = written.items.into_iter();
        self.merge(doing, places, items.map(|item| item.map_err(Error::from)))
    }

    fn merge<T>(
        &self,
        doing: &str,
        places: Vec<Result<(), Error>>,
        answers: impl IntoIterator<Item = ItemResult<T>>,
    ) -> Result<Vec<ItemResult<T>>, Error> {
        refusal::merge(places, answers).ok_or_else(|| {
            let what = format!("{doing}: the store answered another number of items than asked");
            self.failures.of_program(&what)
        })
    }
}

#[async_trait]
impl AnswerSink for Service {
    async fn acknowledge(&self, subscription: &str, answers: Vec<Answer>) -> Result<(), String> {
        let recorded = self.record(subscription, answers).await;
        recorded.map(|_| ()).map_err(|error| error.to_string())
    }
}

/// What the store is asked, and which places of the list it is asked for.
fn split<T>(items: impl IntoIterator<Item = ItemResult<T>>) -> (Vec<T>, Vec<Result<(), Error>>) {
    let mut asked = Vec::new();
    let places = items
        .into_iter()
        .map(|item| item.map(|item| asked.push(item)))
        .collect();
    (asked, places)
}

/// Refuses the items behind the first `granted` that were not refused before.
fn refuse_beyond<T>(items: &mut [ItemResult<T>], granted: usize, refused: impl Fn() -> Error) {
    for item in items.iter_mut().filter(|item| item.is_ok()).skip(granted) {
        *item = Err(refused());
    }
}

/// The outcomes where no delivery can exist.
fn nothing_known(answers: Vec<Result<Option<Answer>, Invalid>>) -> Vec<ItemResult<AnswerOutcome>> {
    let outcome = |answer: Result<Option<Answer>, Invalid>| {
        answer?;
        Ok(AnswerOutcome::NoSuchDelivery)
    };
    answers.into_iter().map(outcome).collect()
}
