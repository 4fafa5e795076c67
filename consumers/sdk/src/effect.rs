//! One transaction: inbox rows first, then the effect, then the commit.
//!
//! It commits only if every answer is CONSUMED. Otherwise nothing of it stays, the inbox rows
//! included, and the messages are tried one by one, so that one bad message does not hold up
//! its neighbours.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use handfast_fail_points::{Point, hit};
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Connection as _, Pool};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use crate::handler::BatchHandler;
use crate::inbox::prune::micros;
use crate::inbox::{InboxDatabase, Seen, Tx};
use crate::message::{Answer, Answered, Delivered};
use crate::report::Report;

/// How long a message waits that met a database which did not take it.
const DATABASE_LATER: Duration = Duration::from_secs(1);
/// How long the end of a transaction is waited for before its connection is given up.
const ROLLBACK_WAIT: Duration = Duration::from_secs(2);
/// Why a message that the inbox may have forgotten is not applied.
const TOO_OLD: &str = "older than the inbox remembers";

/// Times that bound one transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// For the handler, per transaction.
    pub(crate) handler_timeout: Duration,
    /// For a connection, the begin and the inbox rows together.
    pub(crate) inbox_wait: Duration,
    /// What was first sent longer ago and is not in the inbox may have been applied.
    pub(crate) remembers: Duration,
}

/// Applies batches of one subscription.
pub(crate) struct Effects<D: InboxDatabase, H> {
    pub(crate) pool: Pool<D>,
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
    /// The database did not take the transaction, which is no fault of any message.
    Unavailable(String),
}

impl<D: InboxDatabase, H: BatchHandler<D>> Effects<D, H> {
    /// Applies a batch whose ids are all different and says the words on it.
    pub(crate) async fn apply(&self, batch: &[Delivered]) -> Report {
        let mut report = Report::default();
        match self.attempt(batch).await {
            Outcome::Undone(_) if batch.len() > 1 => {
                let mut rest = batch;
                while let Some((message, others)) = rest.split_first() {
                    let one = std::slice::from_ref(message);
                    match self.attempt(one).await {
                        // Each of the others would only wait as long, for the same reason.
                        Outcome::Unavailable(reason) => {
                            let all = Outcome::Unavailable(reason);
                            self.settle(rest, all, &mut report).await;
                            break;
                        }
                        outcome => self.settle(one, outcome, &mut report).await,
                    }
                    rest = others;
                }
            }
            outcome => self.settle(batch, outcome, &mut report).await,
        }
        report
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
            Outcome::Undone(answers) => {
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

    async fn attempt(&self, batch: &[Delivered]) -> Outcome {
        let deadline = Instant::now() + self.limits.inbox_wait;
        let mut held = match timeout_at(deadline, self.pool.acquire()).await {
            Ok(Ok(connection)) => Held {
                connection,
                clean: false,
            },
            Ok(Err(error)) => return Outcome::Unavailable(error.to_string()),
            Err(_) => return self.waited("a connection"),
        };
        let (outcome, clean) = self
            .transaction(&mut held.connection, batch, deadline)
            .await;
        held.clean = clean;
        outcome
    }

    /// True beside the outcome if the connection is certainly outside of a transaction.
    async fn transaction(
        &self,
        connection: &mut D::Connection,
        batch: &[Delivered],
        deadline: Instant,
    ) -> (Outcome, bool) {
        let mut ids: Vec<Uuid> = batch.iter().map(|message| message.message_id).collect();
        ids.sort_unstable();
        let begun = timeout_at(deadline, async {
            // The statement is made of the program's own words and a number.
            let begin = AssertSqlSafe(D::begin(self.limits.inbox_wait));
            let mut tx = connection.begin_with(begin).await?;
            let seen = D::record(&mut tx, &self.subscription, &ids).await?;
            Ok::<_, sqlx::Error>((tx, seen))
        });
        let (mut tx, seen) = match begun.await {
            Ok(Ok(begun)) => begun,
            Ok(Err(error)) => return (Outcome::Unavailable(error.to_string()), false),
            Err(_) => return (self.waited("the inbox"), false),
        };
        hit(Point::CONSUMER_INBOX_WRITTEN);

        let repeats: Vec<bool> = batch
            .iter()
            .map(|message| repeated(message, &seen))
            .collect();
        let answers = self.answers(&mut tx, batch, &repeats, &seen).await;
        if answers.iter().any(|answer| *answer != Answer::Consumed) {
            let clean = matches!(timeout(ROLLBACK_WAIT, tx.rollback()).await, Ok(Ok(())));
            return (Outcome::Undone(answers), clean);
        }
        let refused = match D::refuses_commit(&mut tx).await {
            Ok(refused) => refused,
            Err(error) => return (Outcome::Unavailable(error.to_string()), false),
        };
        if let Some(reason) = refused {
            let answers = vec![Answer::failed(reason); batch.len()];
            return (Outcome::Undone(answers), false);
        }
        hit(Point::CONSUMER_BEFORE_COMMIT);
        match tx.commit().await {
            Ok(()) => {
                hit(Point::CONSUMER_AFTER_COMMIT);
                (Outcome::Committed(repeats), true)
            }
            Err(error) if is_about_data(&error) => {
                let reason = Answer::Failed(format!("cannot commit: {error}"));
                (Outcome::Undone(vec![reason; batch.len()]), false)
            }
            // It may be durable all the same; then the next copy finds its inbox row.
            Err(error) => (
                Outcome::Unavailable(format!("cannot commit: {error}")),
                false,
            ),
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

    fn waited(&self, what: &str) -> Outcome {
        let limit_ms = self.limits.inbox_wait.as_millis();
        Outcome::Unavailable(format!("waited {limit_ms} ms for {what}"))
    }
}

/// A pooled connection that goes back to its pool only when it is known to be clean.
///
/// A begin, statement or commit that was dropped half-way leaves a connection that may still
/// be inside a transaction. Closing it rolls back; the pool opens another.
struct Held<D: InboxDatabase> {
    connection: PoolConnection<D>,
    clean: bool,
}

impl<D: InboxDatabase> Drop for Held<D> {
    fn drop(&mut self) {
        if !self.clean {
            self.connection.close_on_drop();
        }
    }
}

fn repeated(message: &Delivered, seen: &[Seen]) -> bool {
    seen.iter()
        .any(|seen| seen.message_id == message.message_id && seen.times > 1)
}

/// Whether a commit failed by a rule of the schema, which waiting does not heal.
fn is_about_data(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| {
        error.is_unique_violation()
            || error.is_foreign_key_violation()
            || error.is_check_violation()
    })
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}
