//! One batch on one channel, from the first byte to the last publisher confirm, and what is
//! then known of each message.
//!
//! lapin hands a `basic.return` to the next confirm that resolves, which may be another
//! message's. So a channel has one owner and one batch in flight, the returns are collected
//! from all confirms of the batch and matched by routing key and message id, and only what was
//! acked and not returned is sent. That holds when all confirms are in: a return comes before
//! its own confirm, so then none can be missing.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Channel, Confirmation, ErrorKind, PublisherConfirm};
use tokio::time::{Instant, timeout_at};

use super::error::{is_about_a_message, refusal, text};

/// One message on its way to one queue.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// The routing key.
    pub(super) queue: String,
    /// Properties with the message id.
    pub(super) properties: BasicProperties,
    /// The body.
    pub(super) payload: Vec<u8>,
}

/// What is known of a message after its batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Confirmed by RabbitMQ and not returned.
    Sent,
    /// Its queue is not there.
    Returned(String),
    /// Its queue did not take it.
    Nacked,
    /// RabbitMQ closed the channel, and this may be why.
    Suspect(String),
    /// RabbitMQ may have it or not.
    Unknown(String),
    /// It was not written to the connection.
    Untried,
}

/// How far a batch has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Every message has its confirm, or can have none any more.
    Complete,
    /// Some confirms came, and others are missing.
    Moving,
    /// Nothing happened for a while.
    Quiet,
}

/// What one message was told.
enum Told {
    Acked,
    Nacked,
    /// The publish or its confirm failed.
    Failed(lapin::Error),
    /// It could not be handed to the connection.
    NotWritten(lapin::Error),
}

type Key = (String, String);

/// A batch in flight.
pub(super) struct Batch {
    /// Routing key and message id of each message.
    keys: Vec<Key>,
    told: Vec<Option<Told>>,
    returned: HashSet<Key>,
    why_returned: String,
    pending: FuturesUnordered<BoxFuture<'static, (usize, Step)>>,
}

enum Step {
    NotWritten(lapin::Error),
    // Boxed, because a returned message is large and rare.
    Confirmed(Box<lapin::Result<Confirmation>>),
}

impl Batch {
    /// Hands the messages to the channel, which must be in confirm mode and must not be used
    /// for anything else until the batch is complete.
    pub(super) fn start(channel: &Channel, outgoing: Vec<Outgoing>) -> Self {
        let keys = outgoing.iter().map(key).collect();
        let told = outgoing.iter().map(|_| None).collect();
        let pending = outgoing
            .into_iter()
            .enumerate()
            .map(|(index, outgoing)| {
                let channel = channel.clone();
                let one: BoxFuture<'static, _> =
                    Box::pin(async move { (index, one(&channel, outgoing).await) });
                one
            })
            .collect();
        Self {
            keys,
            told,
            returned: HashSet::new(),
            why_returned: String::new(),
            pending,
        }
    }

    /// Goes on until every confirm is in, for at most this long.
    pub(super) async fn progress(&mut self, within: Duration) -> Progress {
        let until = Instant::now() + within;
        let mut reached = Progress::Quiet;
        loop {
            match timeout_at(until, self.pending.next()).await {
                Ok(Some((index, step))) => self.tell(index, step),
                Ok(None) => return Progress::Complete,
                Err(_) => return reached,
            }
            reached = Progress::Moving;
        }
    }

    fn tell(&mut self, index: usize, step: Step) {
        let confirmed = match step {
            Step::NotWritten(error) => {
                self.told[index] = Some(Told::NotWritten(error));
                return;
            }
            Step::Confirmed(confirmed) => *confirmed,
        };
        self.told[index] = Some(match confirmed {
            Ok(Confirmation::Ack(returned)) => {
                self.note(returned);
                Told::Acked
            }
            Ok(Confirmation::Nack(returned)) => {
                self.note(returned);
                Told::Nacked
            }
            // The channel is not in confirm mode: a mistake of ours, never a success.
            Ok(Confirmation::NotRequested) => Told::Failed(ErrorKind::FutureCompleted.into()),
            Err(error) => Told::Failed(error),
        });
    }

    fn note(&mut self, returned: Option<lapin::message::BasicReturnMessage>) {
        let Some(returned) = returned else { return };
        self.why_returned = format!("{} ({})", returned.reply_text, returned.reply_code);
        let id = returned.delivery.properties.message_id().as_ref();
        let id = id.map(ToString::to_string).unwrap_or_default();
        self.returned
            .insert((returned.delivery.routing_key.to_string(), id));
    }

    /// The messages that are known to be sent although others have no confirm yet. A return of
    /// theirs can still be missing only if something of their own queue was returned, and then
    /// they are not among them.
    pub(super) fn sent_so_far(&self) -> Vec<usize> {
        let acked = |index: &usize| {
            matches!(self.told[*index], Some(Told::Acked))
                && !self
                    .returned
                    .iter()
                    .any(|(queue, _)| *queue == self.keys[*index].0)
        };
        (0..self.keys.len()).filter(acked).collect()
    }

    /// What became of each message, in order. `why` is told of those without a confirm.
    pub(super) fn fates(self, why: &str) -> Vec<Fate> {
        let complete = self
            .told
            .iter()
            .all(|told| matches!(told, Some(Told::Acked | Told::Nacked)));
        // What the server said is told to one of the messages at least; the others only learn
        // that their channel is gone.
        let closed = self.told.iter().flatten().find_map(|told| match told {
            Told::Failed(error) | Told::NotWritten(error) => {
                refusal(error).map(|refused| (refused.get_id(), text(error)))
            }
            Told::Acked | Told::Nacked => None,
        });
        let sent: HashSet<usize> = self.sent_so_far().into_iter().collect();
        let fate = |(index, told): (usize, &Option<Told>)| match told {
            _ if self.returned.contains(&self.keys[index]) => {
                Fate::Returned(self.why_returned.clone())
            }
            Some(Told::Acked) if complete || sent.contains(&index) => Fate::Sent,
            Some(Told::Nacked) => Fate::Nacked,
            Some(Told::NotWritten(error)) if was_not_tried(error) => Fate::Untried,
            Some(Told::Failed(_) | Told::NotWritten(_)) | None if closed.is_some() => match &closed
            {
                Some((code, said)) if is_about_a_message(*code) => Fate::Suspect(said.clone()),
                Some((_, said)) => Fate::Unknown(said.clone()),
                None => Fate::Unknown(why.to_owned()),
            },
            Some(Told::Failed(error)) => Fate::Unknown(text(error)),
            Some(Told::Acked | Told::NotWritten(_)) | None => Fate::Unknown(why.to_owned()),
        };
        self.told.iter().enumerate().map(fate).collect()
    }
}

/// Only a channel that was closed before is certain not to have carried the message.
fn was_not_tried(error: &lapin::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_)
    )
}

fn key(outgoing: &Outgoing) -> Key {
    let id = outgoing.properties.message_id().as_ref();
    let id = id.map(ToString::to_string).unwrap_or_default();
    (outgoing.queue.clone(), id)
}

async fn one(channel: &Channel, outgoing: Outgoing) -> Step {
    match written(channel, outgoing).await {
        Ok(confirm) => Step::Confirmed(Box::new(confirm.await)),
        Err(error) => Step::NotWritten(error),
    }
}

async fn written(channel: &Channel, outgoing: Outgoing) -> lapin::Result<PublisherConfirm> {
    let options = BasicPublishOptions {
        // Without it, a message that no queue takes is acked and dropped.
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let publish = channel.basic_publish(
        "".into(),
        outgoing.queue.as_str().into(),
        options,
        &outgoing.payload,
        outgoing.properties,
    );
    publish.await
}

#[cfg(test)]
mod tests;
