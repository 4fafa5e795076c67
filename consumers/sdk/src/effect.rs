//! One transaction: inbox rows first, then the effect, then the commit.
//!
//! It commits only if every answer is CONSUMED. Otherwise nothing of it stays, the inbox rows
//! included, and the messages are tried one by one, so that one bad message does not hold up
//! its neighbours.

mod connections;
#[cfg(test)]
mod tests;
mod transaction;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

pub(crate) use self::connections::{Connections, IDLE};
use crate::handler::BatchHandler;
use crate::inbox::prune::micros;
use crate::inbox::{InboxDatabase, Seen, Tx};
use crate::message::{Answer, Answered, Delivered};
use crate::report::Report;

/// How long a message waits that met a database which did not take it.
const DATABASE_LATER: Duration = Duration::from_secs(1);
/// How long a commit is waited for. Longer than any disk takes: what a database does that gives
/// no word for so long is known only to the inbox.
pub(crate) const COMMIT_WAIT: Duration = Duration::from_secs(30);
/// Why a message that the inbox may have forgotten is not applied.
const TOO_OLD: &str = "older than the inbox remembers";

/// Times that bound one transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// For the handler, per transaction.
    pub(crate) handler_timeout: Duration,
    /// For a connection, the begin and the inbox rows together.
    pub(crate) inbox_wait: Duration,
    /// For the commit.
    pub(crate) commit_wait: Duration,
    /// What was first sent longer ago and is not in the inbox may have been applied.
    pub(crate) remembers: Duration,
}

/// Applies batches of one subscription.
pub(crate) struct Effects<D: InboxDatabase, H> {
    pub(crate) connections: Connections<D>,
    pub(crate) subscription: String,
    pub(crate) handler: H,
    pub(crate) limits: Limits,
    pub(crate) answers: mpsc::Sender<Answered>,
}

/// How a transaction ended.
enum Outcome {
    /// Everything is durable; true for each message that was a repeat.
    Committed(Vec<bool>),
    /// Nothing stays; what each message would be answered if it had been the only one.
    Undone(Vec<Answer>),
    /// What stays is not known; the words on each message, which is not tried again by itself.
    Abandoned(Vec<Answer>),
    /// The database did not take the transaction, which is no fault of any message.
    Unavailable(String),
}

impl<D: InboxDatabase, H: BatchHandler<D>> Effects<D, H> {
    /// Applies a batch whose ids are all different and says the words on it.
    pub(crate) async fn apply(&self, batch: &[Delivered]) -> Report {
        let mut report = Report::default();
        match self.attempt(batch).await {
            Outcome::Undone(answers) if batch.len() > 1 => {
                self.one_by_one(batch, answers, &mut report).await;
            }
            outcome => self.settle(batch, outcome, &mut report).await,
        }
        report
    }

    /// Tries each message of a batch that was undone with these answers by itself.
    async fn one_by_one(&self, batch: &[Delivered], answers: Vec<Answer>, report: &mut Report) {
        let mut rest = batch;
        while let Some((message, others)) = rest.split_first() {
            let one = std::slice::from_ref(message);
            match self.attempt(one).await {
                // What the batch left behind may be in its own way. If nobody failed by it, it
                // would come back the same for ever.
                Outcome::Unavailable(reason) if rest.len() == batch.len() => {
                    let words = answers.into_iter().map(failed_or_later).collect();
                    self.settle(batch, Outcome::Undone(words), report).await;
                    report.database_unavailable = Some(reason);
                    return;
                }
                // Each of the others would only wait as long, for the same reason.
                Outcome::Unavailable(reason) => {
                    let all = Outcome::Unavailable(reason);
                    return self.settle(rest, all, report).await;
                }
                outcome => self.settle(one, outcome, report).await,
            }
            rest = others;
        }
    }

    async fn settle(&self, batch: &[Delivered], outcome: Outcome, report: &mut Report) {
        let answers = match outcome {
            Outcome::Committed(repeats) => {
                for repeat in &repeats {
                    match repeat {
                        true => report.duplicates += 1,
                        false => report.consumed += 1,
                    }
                }
                vec![Answer::Consumed; repeats.len()]
            }
            Outcome::Undone(answers) | Outcome::Abandoned(answers) => {
                for answer in &answers {
                    match answer {
                        // A batch is undone for a reason, so a single message that is has one.
                        Answer::Consumed | Answer::Failed(_) => report.failed += 1,
                        Answer::Later(_) => report.later += 1,
                        Answer::Rejected(_) => report.rejected += 1,
                    }
                }
                answers
            }
            Outcome::Unavailable(reason) => {
                report.later += batch.len() as u64;
                report.database_unavailable = Some(reason);
                vec![Answer::Later(DATABASE_LATER); batch.len()]
            }
        };
        for (message, answer) in batch.iter().zip(answers) {
            tracing::debug!(message.id = %message.message_id, ?answer, "answers");
            // It fails only if the consumer has given up its link; then nobody listens.
            let _ = self.answers.send(Answered::new(message, answer)).await;
        }
    }

    /// One answer per message of the batch; a repeat's is CONSUMED.
    async fn answers(
        &self,
        tx: &mut Tx<D>,
        batch: &[Delivered],
        repeats: &[bool],
        seen: &[Seen],
    ) -> Vec<Answer> {
        let horizon = seen
            .first()
            .map_or(i64::MIN, |seen| seen.now - micros(self.limits.remembers));
        let too_old = |message: &Delivered| message.first_sent_at < horizon;
        let is_new = |(message, repeat): (&Delivered, &bool)| (!repeat).then(|| message.clone());
        if batch
            .iter()
            .zip(repeats)
            .any(|(m, repeat)| !repeat && too_old(m))
        {
            let word = |(message, repeat): (&Delivered, &bool)| match !repeat && too_old(message) {
                true => Answer::Rejected(TOO_OLD.to_owned()),
                false => Answer::Consumed,
            };
            return batch.iter().zip(repeats).map(word).collect();
        }
        let mut words = if repeats.contains(&true) {
            let new: Vec<Delivered> = batch.iter().zip(repeats).filter_map(is_new).collect();
            self.call(tx, &new).await
        } else {
            self.call(tx, batch).await
        }
        .into_iter();
        let word = |repeat: &bool| match repeat {
            true => Answer::Consumed,
            // `call` gives one answer per new message.
            false => words.next().unwrap_or_else(|| Answer::failed("no answer")),
        };
        repeats.iter().map(word).collect()
    }

    /// Lets the handler work, for a bounded time. One answer per message.
    async fn call(&self, tx: &mut Tx<D>, new: &[Delivered]) -> Vec<Answer> {
        if new.is_empty() {
            return Vec::new();
        }
        let limit = self.limits.handler_timeout;
        let started = Instant::now();
        let work = AssertUnwindSafe(async { self.handler.handle_batch(tx, new).await });
        let reason = match timeout(limit, work.catch_unwind()).await {
            // A handler that blocked its thread comes back late without having been stopped.
            Ok(_) | Err(_) if started.elapsed() > limit => {
                format!("handler exceeded {} ms", limit.as_millis())
            }
            Ok(Ok(answers)) if answers.len() == new.len() => return answers,
            Ok(Ok(answers)) => format!(
                "the handler gave {} answers for {} messages",
                answers.len(),
                new.len()
            ),
            Ok(Err(panic)) => format!("handler panicked: {}", text(panic.as_ref())),
            Err(_) => format!("handler exceeded {} ms", limit.as_millis()),
        };
        vec![Answer::Failed(reason); new.len()]
    }
}

/// Keeps the word on a message that failed; about every other nothing is known yet.
fn failed_or_later(answer: Answer) -> Answer {
    match answer {
        Answer::Failed(reason) => Answer::Failed(reason),
        Answer::Consumed | Answer::Later(_) | Answer::Rejected(_) => Answer::Later(DATABASE_LATER),
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}
