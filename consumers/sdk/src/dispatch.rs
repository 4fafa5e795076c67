//! From the source to the handler and back, until the shutdown and then until all is drained.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::Pool;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::consumer::Options;
use crate::effect::{COMMIT_WAIT, Connections, Effects, IDLE, Limits};
use crate::error::Error;
use crate::handler::BatchHandler;
use crate::inbox::prune::Pruner;
use crate::inbox::{self, InboxDatabase};
use crate::queue::Queue;
use crate::report::Report;
use crate::source::{Link, Opener, Order};

/// How long answers that were given before the drain deadline are still tried to be recorded.
const LAST_CALL: Duration = Duration::from_secs(1);

/// Runs one consumer from its start to its end.
pub(crate) async fn run<D: InboxDatabase, H: BatchHandler<D>>(
    opener: Opener,
    pool: Pool<D>,
    options: Options,
    handler: H,
    shutdown: CancellationToken,
) -> Result<Report, Error> {
    if !open_inbox(&pool, &options.subscription, &shutdown).await? {
        return Ok(Report::default());
    }
    // Ends the pruning also when this future is dropped.
    let over = CancellationToken::new();
    let _over = over.clone().drop_guard();
    let subscription = options.subscription.clone();
    let pruner = Pruner::new(pool.clone(), subscription, options.retention);
    tokio::spawn(pruner.run(over));

    let link = opener.open(Order {
        topic: options.topic.clone(),
        subscription: options.subscription.clone(),
        consumer: options.consumer.clone(),
        prefetch: options.prefetch,
    });
    tracing::info!(
        topic = options.topic,
        subscription = options.subscription,
        consumer = options.consumer,
        "consuming"
    );
    let effects = Arc::new(Effects {
        connections: Connections::new(pool),
        subscription: options.subscription.clone(),
        handler,
        limits: Limits {
            handler_timeout: options.handler_timeout,
            inbox_wait: options.inbox_wait,
            commit_wait: COMMIT_WAIT,
            remembers: options.remembers(),
        },
        answers: link.answers.clone(),
    });
    let report = consume(link, effects, &options, shutdown).await?;
    tracing::info!(subscription = options.subscription, ?report, "stopped");
    Ok(report)
}

/// Waits for a database that can hold the inbox. False if the shutdown came first.
async fn open_inbox<D: InboxDatabase>(
    pool: &Pool<D>,
    subscription: &str,
    shutdown: &CancellationToken,
) -> Result<bool, Error> {
    let mut backoff = Backoff::new();
    let mut trouble = None;
    loop {
        let opened = tokio::select! {
            opened = inbox::prepare(pool, true) => opened,
            () = shutdown.cancelled() => return Ok(false),
        };
        match opened {
            Ok(()) => return Ok(true),
            Err(error) if error.may_heal() => {
                let text = error.to_string();
                if trouble.as_ref() != Some(&text) {
                    tracing::warn!(subscription, error = text, "waiting for the inbox");
                    trouble = Some(text);
                }
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = sleep(backoff.next()) => {}
            () = shutdown.cancelled() => return Ok(false),
        }
    }
}

async fn consume<D: InboxDatabase, H: BatchHandler<D>>(
    link: Link,
    effects: Arc<Effects<D, H>>,
    options: &Options,
    shutdown: CancellationToken,
) -> Result<Report, Error> {
    let Link {
        mut deliveries,
        answers,
        stop,
        recorder,
        recorded,
        receiver,
    } = link;
    // Only `effects` keeps a sender, so that its end is the end of all answers.
    drop(answers);
    let mut report = Report::default();
    let mut database = DatabaseLog::new(&options.subscription);
    let mut queue = Queue::default();
    let mut work: JoinSet<Report> = JoinSet::new();
    let mut alone = false;
    let mut keeps = false;
    let mut open = true;
    let mut received: u64 = 0;
    let mut deadline = None;
    while open || !queue.is_empty() || !work.is_empty() {
        while !alone && work.len() < options.concurrency {
            let Some(batch) = queue.take(options.max_batch, work.is_empty()) else {
                break;
            };
            alone = batch.iter().any(|message| message.alone);
            let effects = Arc::clone(&effects);
            work.spawn(async move { effects.apply(&batch).await });
        }
        tokio::select! {
            () = shutdown.cancelled(), if deadline.is_none() => {
                stop.cancel();
                deadline = Some(Instant::now() + options.drain_deadline);
            }
            () = at(deadline) => break,
            () = sleep(IDLE), if keeps => keeps = effects.connections.tidy(),
            Some(done) = work.join_next(), if !work.is_empty() => {
                (alone, keeps) = (false, true);
                let done = done.map_err(|error| Error::Task(error.to_string()))?;
                database.observe(&done);
                report.add(&done);
            }
            message = deliveries.recv(), if open => match message {
                Some(message) => {
                    received += 1;
                    queue.push(message);
                    while let Ok(message) = deliveries.try_recv() {
                        received += 1;
                        queue.push(message);
                    }
                }
                None => open = false,
            },
        }
    }
    // What still runs at the deadline is rolled back; the service sends it again.
    // A handler that blocks its thread cannot be stopped, and must not keep the process.
    let _ = timeout(LAST_CALL, work.shutdown()).await;
    effects.connections.give_all_back();
    drop(effects);
    // Without a last call there is nothing left to do: the counts say what was recorded.
    let _ = timeout(LAST_CALL, recorder).await;
    drop(receiver);
    report.no_such_delivery = recorded.no_such_delivery.load(Ordering::Relaxed);
    report.refused = recorded.refused.load(Ordering::Relaxed);
    report.unreadable = recorded.unreadable.load(Ordering::Relaxed);
    let settled =
        recorded.recorded.load(Ordering::Relaxed) + report.no_such_delivery + report.refused;
    report.unanswered = received.saturating_sub(settled);
    Ok(report)
}

/// Logs that the database stopped taking transactions, and that it takes them again.
struct DatabaseLog {
    subscription: String,
    away: bool,
}

impl DatabaseLog {
    fn new(subscription: &str) -> Self {
        Self {
            subscription: subscription.to_owned(),
            away: false,
        }
    }

    fn observe(&mut self, done: &Report) {
        match &done.database_unavailable {
            Some(reason) if !self.away => {
                self.away = true;
                tracing::warn!(
                    subscription = self.subscription,
                    reason,
                    "the database does not take transactions; messages are answered LATER"
                );
            }
            None if self.away => {
                self.away = false;
                tracing::info!(
                    subscription = self.subscription,
                    "the database takes transactions again"
                );
            }
            _ => {}
        }
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
