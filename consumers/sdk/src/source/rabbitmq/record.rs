//! Publishes answers, and repeats them until RabbitMQ has confirmed them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use handfast_fail_points::{Point, hit};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::company::Company;
use super::door::{Door, Kind, Open, Trouble, command};
use super::held::{Key, key};
use super::{COMMAND_TIMEOUT, LAST_BACKOFF, wire};
use crate::backoff::Backoff;
use crate::message::Answered;
use crate::source::Recorded;
use crate::source::reachable::Reachable;

/// How many answers are taken from the consumer before they are published.
pub(super) const MAX_WAITING: usize = 500;
/// Messages of answers survive a restart of RabbitMQ.
const PERSISTENT: u8 = 2;

pub(super) struct Record {
    pub(super) door: Door,
    /// The queue of answers.
    pub(super) acknowledge: ShortString,
    pub(super) subscription: String,
    pub(super) answers: mpsc::Receiver<Answered>,
    /// Which answers go together.
    pub(super) company: Company,
    /// Tells which answers are confirmed, so that their deliveries can be acked.
    pub(super) recorded: mpsc::UnboundedSender<Vec<Key>>,
    pub(super) done: Arc<Recorded>,
}

/// A channel in confirm mode. Only one message is in flight on it, because lapin hands a return
/// to the wrong confirm when there are more.
struct Publisher {
    open: Open,
    channel: Channel,
    user: ShortString,
}

impl Record {
    /// Runs until nobody can answer any more and every answer is confirmed.
    ///
    /// The message in flight is the window in which answers are collected for the next. Where few
    /// come, they wait for each other a little.
    pub(super) async fn run(mut self) {
        let mut waiting: VecDeque<Answered> = VecDeque::new();
        let mut backoff = Backoff::up_to(LAST_BACKOFF);
        let mut reachable = Reachable::new("record answers");
        let mut publisher = None;
        loop {
            if waiting.is_empty() {
                match self.answers.recv().await {
                    Some(answer) => waiting.push_back(answer),
                    None => break,
                }
                self.company.collect(&mut self.answers, &mut waiting).await;
            }
            while waiting.len() < MAX_WAITING
                && let Ok(answer) = self.answers.try_recv()
            {
                waiting.push_back(answer);
            }
            match self.publish(&mut publisher, &waiting).await {
                Ok(count) => {
                    reachable.yes(self.door.address().shown());
                    backoff.reset();
                    let keys: Vec<Key> = waiting.drain(..count).map(|one| key(&one)).collect();
                    self.done
                        .recorded
                        .fetch_add(keys.len() as u64, Ordering::Relaxed);
                    hit(Point::CONSUMER_PUBLISHED);
                    // Without a receiver there is no channel left to ack on.
                    let _ = self.recorded.send(keys);
                }
                Err(trouble) => {
                    reachable.no(self.door.address().shown(), trouble.kind, &trouble.reason);
                    if trouble.fatal {
                        publisher = None;
                    }
                    sleep(backoff.next()).await;
                }
            }
        }
        if let Some(Publisher { open, .. }) = publisher {
            open.close().await;
        }
    }

    /// Publishes one message of answers and says how many it carried.
    async fn publish(
        &mut self,
        publisher: &mut Option<Publisher>,
        waiting: &VecDeque<Answered>,
    ) -> Result<usize, Trouble> {
        let (body, count) = wire::write(&self.subscription, waiting)
            .map_err(|error| Trouble::passing(Kind::Refused(0), &error.to_string()))?;
        if publisher
            .as_ref()
            .is_some_and(|open| !open.channel.status().connected())
        {
            *publisher = None;
        }
        let publisher = match publisher {
            Some(publisher) => publisher,
            None => publisher.insert(self.open().await?),
        };
        // RabbitMQ proves that the name is true, so that an answer can be held against it.
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_user_id(publisher.user.clone());
        let mandatory = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let queue = self.acknowledge.clone();
        let confirmed = timeout(COMMAND_TIMEOUT, async {
            publisher
                .channel
                .basic_publish("".into(), queue, mandatory, &body, properties)
                .await?
                .await
        });
        match confirmed.await {
            Ok(Ok(Confirmation::Ack(None))) => Ok(count),
            Ok(Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)))) => Err(
                Trouble::passing(Kind::Returned, returned.reply_text.as_str()),
            ),
            Ok(Ok(Confirmation::Nack(None))) => Err(Trouble::passing(
                Kind::Nacked,
                "RabbitMQ did not take the answers",
            )),
            // The channel is in confirm mode, so this does not happen; if it did, nothing
            // would say that the answers are safe.
            Ok(Ok(Confirmation::NotRequested)) => Err(Trouble::silent("answers")),
            Ok(Err(error)) => Err(Trouble {
                fatal: true,
                ..Trouble::from(error)
            }),
            Err(_) => Err(match publisher.open.blocked() {
                Some(reason) => Trouble {
                    kind: Kind::Blocked,
                    reason: format!("RabbitMQ takes nothing: {reason}"),
                    fatal: true,
                },
                None => Trouble::silent("answers"),
            }),
        }
    }

    async fn open(&mut self) -> Result<Publisher, Trouble> {
        let mut open = self.door.connect().await?;
        let user = ShortString::try_new(self.door.address().user()).unwrap_or_default();
        let channel = open.channel().await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        command("the wish for confirms", confirms).await?;
        Ok(Publisher {
            open,
            channel,
            user,
        })
    }
}
