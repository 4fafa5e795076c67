//! One transaction, from its begin to its commit; each step is waited for only so long.

use std::time::Duration;

use handfast_fail_points::{Point, hit};
use sqlx::error::DatabaseError;
use sqlx::{AssertSqlSafe, Connection as _, Transaction};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::{Effects, Outcome};
use crate::handler::BatchHandler;
use crate::inbox::held::Held;
use crate::inbox::{InboxDatabase, Seal, Seen};
use crate::message::{Answer, Delivered};

/// How long the end of a transaction is waited for before its connection is given up.
const ROLLBACK_WAIT: Duration = Duration::from_secs(2);

/// Why a transaction was not committed.
enum Uncommitted {
    /// By what it holds: the messages have failed.
    Refused(String),
    /// The database could not, or did not say.
    Unavailable(String),
}

impl<D: InboxDatabase, H: BatchHandler<D>> Effects<D, H> {
    /// Tries the batch once, in one transaction.
    pub(super) async fn attempt(&self, batch: &[Delivered]) -> Outcome {
        let deadline = Instant::now() + self.limits.inbox_wait;
        let mut held = match timeout_at(deadline, Held::acquire(&self.pool)).await {
            Ok(Ok(held)) => held,
            Ok(Err(error)) => return Outcome::Unavailable(error.to_string()),
            Err(_) => return waited(self.limits.inbox_wait, "a connection"),
        };
        let (outcome, clean) = self
            .transaction(&mut held.connection, batch, deadline)
            .await;
        held.clean = clean && in_time(D::unseal(&mut held.connection)).await;
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
        let seal = Seal::default();
        let begun = timeout_at(deadline, async {
            let limits = &self.limits;
            // The statement is made of the program's own words and numbers.
            let begin = AssertSqlSafe(D::begin(limits.inbox_wait, limits.handler_timeout));
            let mut tx = connection.begin_with(begin).await?;
            D::seal(&mut tx, &seal).await?;
            let seen = D::record(&mut tx, &self.subscription, &ids).await?;
            Ok::<_, sqlx::Error>((tx, seen))
        });
        let (mut tx, seen) = match begun.await {
            Ok(Ok(begun)) => begun,
            Ok(Err(error)) => return (Outcome::Unavailable(error.to_string()), false),
            Err(_) => return (waited(self.limits.inbox_wait, "the inbox"), false),
        };
        hit(Point::CONSUMER_INBOX_WRITTEN);

        let repeats: Vec<bool> = batch
            .iter()
            .map(|message| repeated(message, &seen))
            .collect();
        let answers = self.answers(&mut tx, batch, &repeats, &seen).await;
        if answers.iter().any(|answer| *answer != Answer::Consumed) {
            let clean = in_time(tx.rollback()).await;
            return (Outcome::Undone(answers), clean);
        }
        match timeout(self.limits.commit_wait, commit::<D>(tx, &seal)).await {
            Ok(Ok(())) => (Outcome::Committed(repeats), true),
            Ok(Err(Uncommitted::Refused(reason))) => {
                let answers = vec![Answer::Failed(reason); batch.len()];
                (Outcome::Undone(answers), false)
            }
            Ok(Err(Uncommitted::Unavailable(reason))) => (Outcome::Unavailable(reason), false),
            // It may be durable all the same; then the next copy finds its inbox row.
            Err(_) => (waited(self.limits.commit_wait, "the commit"), false),
        }
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
