//! One transaction, from its begin to its commit; each step is waited for only so long.

use std::time::Duration;

use handfast_fail_points::{Point, hit};
use sqlx::error::DatabaseError;
use sqlx::{AssertSqlSafe, Connection as _, Transaction};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::{Effects, Outcome};
use crate::handler::BatchHandler;
use crate::inbox::{InboxDatabase, Seal, Seen};
use crate::message::{Answer, Delivered};

/// How long the end of a transaction is waited for before its connection is given up.
const ROLLBACK_WAIT: Duration = Duration::from_secs(2);

/// Why a message is for a person to look at.
const WENT_ON: &str = "the handler went on after an error had ended its transaction, and what it wrote \
                       since may be applied";

/// Why a transaction was not committed.
enum Uncommitted {
    /// By what it holds: the messages have failed.
    Refused(String),
    /// The database could not, or did not say.
    Unavailable(String),
}

/// How a transaction left its connection.
enum End {
    /// Certainly outside of a transaction.
    Clean,
    Unclear,
    /// Not even the begin was done, so nothing else was.
    NotBegun,
}

impl<D: InboxDatabase, H: BatchHandler<D>> Effects<D, H> {
    /// Tries the batch once, in one transaction.
    pub(super) async fn attempt(&self, batch: &[Delivered]) -> Outcome {
        let deadline = Instant::now() + self.limits.inbox_wait;
        loop {
            let mut taken = match timeout_at(deadline, self.connections.take()).await {
                Ok(Ok(taken)) => taken,
                Ok(Err(error)) => return Outcome::Unavailable(error.to_string()),
                Err(_) => return waited(self.limits.inbox_wait, "a connection"),
            };
            let connection = &mut taken.held.connection;
            let (outcome, end) = self.transaction(connection, batch, deadline).await;
            match end {
                // It was lost since it was used. What the pool gives was asked whether it lives.
                End::NotBegun if taken.was_kept => continue,
                End::NotBegun | End::Unclear => {}
                End::Clean => {
                    taken.held.clean = in_time(D::unseal(&mut taken.held.connection)).await;
                    self.connections.put(taken);
                }
            }
            return outcome;
        }
    }

    async fn transaction(
        &self,
        connection: &mut D::Connection,
        batch: &[Delivered],
        deadline: Instant,
    ) -> (Outcome, End) {
        let mut ids: Vec<Uuid> = batch.iter().map(|message| message.message_id).collect();
        ids.sort_unstable();
        let seal = Seal::default();
        let begun = timeout_at(deadline, async {
            let limits = &self.limits;
            // The statement is made of the program's own words and numbers.
            let begin = AssertSqlSafe(D::begin(limits.inbox_wait, limits.handler_timeout));
            let begun = connection.begin_with(begin).await;
            let mut tx = begun.map_err(|error| (error, End::NotBegun))?;
            let recorded = async {
                D::seal(&mut tx, &seal).await?;
                D::record(&mut tx, &self.subscription, &ids).await
            };
            let seen = recorded.await.map_err(|error| (error, End::Unclear))?;
            Ok((tx, seen))
        });
        let (mut tx, seen) = match begun.await {
            Ok(Ok(begun)) => begun,
            Ok(Err((error, end))) => return (Outcome::Unavailable(error.to_string()), end),
            Err(_) => return (waited(self.limits.inbox_wait, "the inbox"), End::Unclear),
        };
        hit(Point::CONSUMER_INBOX_WRITTEN);

        let repeats: Vec<bool> = batch
            .iter()
            .map(|message| repeated(message, &seen))
            .collect();
        let answers = self.answers(&mut tx, batch, &repeats, &seen).await;
        if D::went_on(&tx) {
            return (self.went_on(batch), End::Unclear);
        }
        if answers.iter().any(|answer| *answer != Answer::Consumed) {
            // A `begin` of the handler's that failed or was dropped has ended it, or will with the
            // next statement, and then there is nothing left to roll back here.
            let is_open = tx.is_in_transaction();
            let end = match is_open && in_time(tx.rollback()).await {
                true => End::Clean,
                false => End::Unclear,
            };
            return (Outcome::Undone(answers), end);
        }
        match timeout(self.limits.commit_wait, commit::<D>(tx, &seal)).await {
            Ok(Ok(())) => (Outcome::Committed(repeats), End::Clean),
            Ok(Err(Uncommitted::Refused(reason))) => {
                let answers = vec![Answer::Failed(reason); batch.len()];
                (Outcome::Undone(answers), End::Unclear)
            }
            Ok(Err(Uncommitted::Unavailable(reason))) => {
                (Outcome::Unavailable(reason), End::Unclear)
            }
            // It may be durable all the same; then the next copy finds its inbox row.
            Err(_) => (waited(self.limits.commit_wait, "the commit"), End::Unclear),
        }
    }
}

impl<D: InboxDatabase, H> Effects<D, H> {
    /// No message of the batch is tried again by itself: that might apply it a second time.
    fn went_on(&self, batch: &[Delivered]) -> Outcome {
        tracing::error!(
            subscription = self.subscription,
            messages = batch.len(),
            "the handler went on after an error had ended its transaction; look whether what it \
             wrote since is applied before you send these messages again"
        );
        Outcome::Abandoned(vec![Answer::rejected(WENT_ON); batch.len()])
    }
}

async fn commit<D: InboxDatabase>(
    mut tx: Transaction<'_, D>,
    seal: &Seal,
) -> Result<(), Uncommitted> {
    match D::refuses_commit(&mut tx, seal).await {
        Ok(None) => {}
        Ok(Some(reason)) => return Err(Uncommitted::Refused(reason.to_owned())),
        Err(error) => return Err(Uncommitted::Unavailable(error.to_string())),
    }
    hit(Point::CONSUMER_BEFORE_COMMIT);
    seal.open();
    let committed = tx.commit().await;
    committed.map_err(|error| {
        let reason = format!("cannot commit: {error}");
        match is_about_data::<D>(&error) {
            true => Uncommitted::Refused(reason),
            // It may be durable all the same; then the next copy finds its inbox row.
            false => Uncommitted::Unavailable(reason),
        }
    })?;
    hit(Point::CONSUMER_AFTER_COMMIT);
    Ok(())
}

/// Whether a commit failed by a rule of the schema, which waiting does not heal.
fn is_about_data<D: InboxDatabase>(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| D::is_about_data(&code))
}

/// Whether what ends a transaction was done, and soon.
async fn in_time(ending: impl Future<Output = Result<(), sqlx::Error>>) -> bool {
    matches!(timeout(ROLLBACK_WAIT, ending).await, Ok(Ok(())))
}

fn repeated(message: &Delivered, seen: &[Seen]) -> bool {
    seen.iter()
        .any(|seen| seen.message_id == message.message_id && seen.times > 1)
}

fn waited(limit: Duration, what: &str) -> Outcome {
    Outcome::Unavailable(format!("waited {} ms for {what}", limit.as_millis()))
}
