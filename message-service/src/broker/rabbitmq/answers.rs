//! Answers come back over AMQP, so that they outlive the service: consumers put them into one
//! queue, and every replica takes from it.
//!
//! A message of answers is acked when everything in it is durable. One that cannot be read is
//! acked too, since it would never get better, and is counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use handfast_fail_points::{Point, hit};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::{Instant, timeout};

use super::RabbitMq;
use super::error::Error;
use super::link::{Opened, STEP};
use super::{declare, wire};
use crate::broker::AnswerSink;
use crate::message::Answer;
use crate::pass::Trouble;

/// Messages of answers that are here without being durable.
const PREFETCH: u16 = 100;
/// Messages of answers that are written together.
const TOGETHER: usize = 50;
/// Answers in one write, as the port allows.
const SLICE: usize = 500;
/// The wait after answers could not be written.
const RETRY: Duration = Duration::from_millis(200);
/// One line per kind of incident in this time.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// How long nothing comes before the consumer is made anew. RabbitMQ can forget a consumer without
/// a word, as when its queue is deleted and is back at once.
const QUIET: Duration = Duration::from_secs(10);
/// How long the beginning may take: after a crash RabbitMQ takes some seconds before a queue has
/// consumers again, and beginning anew would only take as long.
const BEGIN: Duration = Duration::from_secs(30);
/// How long answers may take from RabbitMQ's hands to the disk; well below the time for which a
/// queue has to be empty before anything in it counts as lost.
const USUAL_WRITE: Duration = Duration::from_secs(1);
/// How long answers that cannot be written are kept here while the store is away; then others may
/// have them.
const KEPT: Duration = Duration::from_secs(5);
/// The tag of our consumer, for people.
const TAG: &str = "handfast-answers";

/// What was wrong with answers, since the start.
#[derive(Debug, Default)]
pub(super) struct Incidents {
    /// Messages, or single answers in them, that cannot be read.
    unreadable: Incident,
    /// For a subscription that nobody declared.
    unknown: Incident,
    /// By another AMQP user than the subscription's.
    foreign: Incident,
}

#[derive(Debug, Default)]
struct Incident {
    count: AtomicU64,
    logged: std::sync::Mutex<Option<Instant>>,
}

impl Incident {
    fn happened(&self, times: u64, what: &str) {
        let count = self.count.fetch_add(times, Ordering::Relaxed) + times;
        let mut logged = self
            .logged
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            *logged = Some(Instant::now());
            tracing::warn!(count, "{count} answers so far were of no use: {what}");
        }
    }
}

impl Incidents {
    /// Unreadable, unknown, foreign.
    pub(super) fn counts(&self) -> [u64; 3] {
        [&self.unreadable, &self.unknown, &self.foreign]
            .map(|incident| incident.count.load(Ordering::Relaxed))
    }
}

/// Why answers are not taken, as two see it: who consumes them, and who looks at their queue.
#[derive(Debug, Default)]
pub(super) struct Standstill {
    why: std::sync::Mutex<[Option<String>; 2]>,
    writing_since: std::sync::Mutex<Option<Instant>>,
}

impl Standstill {
    /// The queue was looked at.
    pub(super) fn looked(&self, why: Option<String>) {
        self.lock()[0] = why;
    }

    /// Taking answers began, or could not.
    fn taken(&self, why: Option<String>) {
        self.lock()[1] = why;
    }

    /// Messages of answers are here whose answers are not durable.
    fn writes(&self, writes: bool) {
        let since = writes.then(Instant::now);
        *self
            .writing_since
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = since;
    }

    /// True while answers may wait here or in RabbitMQ without being counted there. Under load
    /// some answer is always on its way; what takes no longer than usual is no ground.
    pub(super) fn is_present(&self) -> bool {
        let since = *self
            .writing_since
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() >= USUAL_WRITE)
            || self.lock().iter().any(Option::is_some)
    }

    /// One line for people; empty if all is well.
    pub(super) fn shown(&self) -> String {
        self.lock()
            .iter()
            .flatten()
            .next()
            .cloned()
            .unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Option<String>; 2]> {
        self.why
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Takes answers until the broker stops.
pub(super) async fn run(rabbit: Arc<RabbitMq>, sink: Arc<dyn AnswerSink>) {
    let mut trouble = Trouble::new("taking answers");
    let mut ours = rabbit.ours.subscribe();
    tokio::select! {
        () = rabbit.stopping.cancelled() => return,
        // It ends with the broker, which holds the sender.
        _ = ours.wait_for(|ours| *ours) => {}
    }
    loop {
        let opened = tokio::select! {
            () = rabbit.stopping.cancelled() => return,
            opened = rabbit.consuming.ready() => opened,
        };
        let taken = take(&rabbit, sink.as_ref(), &opened).await;
        if rabbit.stopping.is_cancelled() {
            return;
        }
        if let Err(error) = &taken {
            let queue = rabbit.names.acknowledge();
            let why = format!("queue {queue}: {error}");
            rabbit.answers_trouble.taken(Some(why));
        }
        trouble.note(taken);
        tokio::time::sleep(RETRY).await;
    }
}

/// Takes answers on one channel until it is over.
async fn take(rabbit: &RabbitMq, sink: &dyn AnswerSink, opened: &Arc<Opened>) -> Result<(), Error> {
    let queue = rabbit.names.acknowledge();
    // What cannot be written is better off in RabbitMQ than here.
    let store = rabbit.store.topology().await;
    store.map_err(|error| Error::StoreAway(error.to_string()))?;
    declare::acknowledge(opened, &queue).await?;
    let channel = opened.channel().await?;
    let mut consumer = match consume(rabbit, &channel, &queue).await {
        Ok(consumer) => {
            rabbit.answers_trouble.taken(None);
            consumer
        }
        Err(error) => {
            // It may have begun all the same, and then RabbitMQ gives this channel what nobody
            // takes.
            opened.give_up();
            return Err(error);
        }
    };
    loop {
        let first = tokio::select! {
            first = consumer.next() => first,
            () = rabbit.stopping.cancelled() => {
                // A connection that does not end this is closed anyway.
                let _ = end(&channel).await;
                return Ok(());
            }
            () = tokio::time::sleep(QUIET) => {
                let ended = end(&channel).await;
                if ended.is_err() {
                    opened.give_up();
                }
                return ended;
            }
            () = opened.gone() => return Ok(()),
        };
        let Some(first) = first else {
            return Ok(());
        };
        let mut messages = vec![first?];
        while messages.len() < TOGETHER {
            match consumer.next().now_or_never() {
                Some(Some(Ok(message))) => messages.push(message),
                Some(Some(Err(error))) => return Err(error.into()),
                Some(None) | None => break,
            }
        }
        rabbit.answers_trouble.writes(true);
        let written = write(rabbit, sink, &messages).await;
        rabbit.answers_trouble.writes(false);
        match written {
            Written::All => {}
            Written::Stopped => return Ok(()),
            Written::StoreAway => return end(&channel).await,
        }
        hit(Point::ANSWERS_RECORDED);
        // Everything up to the last one is durable, because they are taken in order.
        if let Some(last) = messages.last() {
            let up_to = BasicAckOptions { multiple: true };
            channel.basic_ack(last.delivery_tag, up_to).await?;
        }
    }
}

/// Ends the consumer and its channel. What is left on the channel goes back to the queue.
async fn end(channel: &Channel) -> Result<(), Error> {
    let ended = timeout(STEP, async {
        channel
            .basic_cancel(TAG.into(), BasicCancelOptions::default())
            .await?;
        channel.close(200, "OK".into()).await
    });
    match ended.await {
        Ok(ended) => Ok(ended?),
        Err(_) => Err(Error::timed_out("end a consumer of answers", STEP)),
    }
}

async fn consume(rabbit: &RabbitMq, channel: &Channel, queue: &str) -> Result<Consumer, Error> {
    let begin = async {
        channel
            .basic_qos(PREFETCH, BasicQosOptions::default())
            .await?;
        channel
            .basic_consume(
                queue.into(),
                TAG.into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
    };
    let mut begin = std::pin::pin!(begin);
    if let Ok(consumer) = timeout(STEP, &mut begin).await {
        return Ok(consumer?);
    }
    let slow = Error::timed_out("consume answers", STEP);
    let why = format!("queue {queue}: {slow}");
    rabbit.answers_trouble.taken(Some(why));
    match timeout(BEGIN - STEP, begin).await {
        Ok(consumer) => Ok(consumer?),
        Err(_) => Err(Error::timed_out("consume answers", BEGIN)),
    }
}

/// What became of messages of answers.
enum Written {
    /// Everything in them is durable.
    All,
    /// The broker stops first.
    Stopped,
    /// The store is away. They go back to RabbitMQ, so that other processes can have them.
    StoreAway,
}

/// Makes everything in these messages durable. What cannot be written is tried again after
/// everything else was.
async fn write(rabbit: &RabbitMq, sink: &dyn AnswerSink, messages: &[Delivery]) -> Written {
    let mut by: BTreeMap<String, Vec<Answer>> = BTreeMap::new();
    for message in messages {
        if let Some((subscription, answers)) = read(rabbit, message) {
            by.entry(subscription).or_default().extend(answers);
        }
    }
    let mut left: Vec<(&str, &[Answer])> = by
        .iter()
        .flat_map(|(name, answers)| answers.chunks(SLICE).map(|slice| (name.as_str(), slice)))
        .collect();
    let mut trouble = Trouble::new("writing answers");
    let began = Instant::now();
    loop {
        let mut failed = Vec::new();
        for (subscription, slice) in left {
            let written = sink.acknowledge(subscription, slice.to_vec()).await;
            if trouble.note(written).is_none() {
                failed.push((subscription, slice));
            }
        }
        if failed.is_empty() {
            return Written::All;
        }
        // A row that somebody has locked is no ground to give everything back.
        if began.elapsed() >= KEPT && rabbit.store.topology().await.is_err() {
            return Written::StoreAway;
        }
        left = failed;
        tokio::select! {
            () = rabbit.stopping.cancelled() => return Written::Stopped,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// What a message says, if it may say it.
fn read(rabbit: &RabbitMq, message: &Delivery) -> Option<(String, Vec<Answer>)> {
    let incidents = &rabbit.incidents;
    let answers = match wire::answers(&message.data) {
        Ok(answers) => answers,
        Err(why) => {
            incidents
                .unreadable
                .happened(1, &format!("the message cannot be read: {why}"));
            return None;
        }
    };
    let name = answers.subscription;
    if answers.unreadable > 0 {
        let what = format!("answers for `{}` cannot be read", name.escape_debug());
        incidents.unreadable.happened(answers.unreadable, &what);
    }
    let number = answers.answers.len() as u64;
    let topology = rabbit.topology.get();
    let Some(subscription) = topology.subscriptions.get(&name) else {
        // It may be newer than our copy of the topology, or removed while answers were on
        // their way; the store knows. Only what cannot be a name is refused here.
        if crate::message::limits::name("subscription", &name).is_err() {
            incidents
                .unknown
                .happened(number, "the subscription has no possible name");
            return None;
        }
        let what = format!("there is no subscription `{name}`");
        incidents.unknown.happened(number, &what);
        return Some((name, answers.answers));
    };
    let user = message.properties.user_id().as_ref();
    if let Some(wanted) = &subscription.amqp_user
        && user.map(lapin::types::ShortString::as_str) != Some(wanted.as_str())
    {
        let what = format!("only AMQP user `{wanted}` may answer for {name}");
        incidents.foreign.happened(number, &what);
        return None;
    }
    Some((name, answers.answers))
}
