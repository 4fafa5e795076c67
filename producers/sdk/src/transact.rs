//! One business transaction and its message, together or not at all.
//!
//! ```text
//! new id → prepare → BEGIN, fence row COMMITTED → the closure → COMMIT → confirm
//!                       │ fenced by a check          │ error      │ failed
//!                       └→ once more, new id         │            └→ ask the fence
//!                                                    └→ ROLLBACK, fence like a check, cancel
//! ```
//!
//! What touches the database's transaction state runs in tasks of its own, so that a caller
//! who drops the future, for example in a time-out, cannot stop half-way: before COMMIT the
//! drop is a rollback, after it the drop changes nothing.

use std::ops::AsyncFnOnce;
use std::time::Duration;

use handfast_fail_points::{Point, hit, skips};
use handfast_proto::v1::NewMessage;
use sqlx::Pool;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::Code;
use uuid::Uuid;

use crate::bounded::until;
use crate::client::{Producer, out_of_time, waited_ms};
use crate::error::{CallError, Refusal, TransactError};
use crate::fence::{Asker, FenceDatabase, FenceIdentity, FenceVerdict, Settled, settle_in_task};
use crate::message::Message;
use crate::pace::Pace;
use crate::tx::Tx;

/// Tries with a new id after a check has fenced the one before.
const MAX_RESTARTS: u32 = 2;
/// The fence is asked for this long after a failed commit or a rollback.
const SETTLE_BUDGET: Duration = Duration::from_secs(2);
/// A caller waits this long for its confirm or cancel; they go on behind its back.
const CALLER_WAITS: Duration = Duration::from_secs(1);

/// What [`Producer::transact`] has achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The transaction committed, with what the closure returned. The message will be
    /// delivered, whatever became of the confirm.
    Committed(T),
    /// The key is held by a confirmed message: the fact was made true by another try, and the
    /// closure did not run.
    AlreadyCommitted,
}

/// What a prepare led to.
enum Prepared {
    /// The message is kept; the business may begin.
    Ready,
    /// The key belongs to a message whose business committed.
    HolderConfirmed,
    /// A check has cancelled this id before the reply to its prepare arrived.
    AlreadyCancelled,
}

/// What a begin led to.
enum Begun<DB: FenceDatabase> {
    Open(Tx<DB>),
    /// The fence row was there before.
    Fenced(FenceVerdict),
}

/// What a commit led to.
enum Commit {
    Committed,
    RolledBack(sqlx::Error),
    Unknown(String),
}

impl Producer {
    /// Runs `business` in a transaction of `pool` and has `message` delivered if, and only if,
    /// that transaction commits.
    ///
    /// The closure gets the open transaction, see [`Tx`]. It runs at most once: after its
    /// error everything is rolled back and the error returned as [`TransactError::Business`].
    /// It must not commit or roll back by itself. If it swallows an error after which the
    /// database has given the transaction up, as PostgreSQL does after each and SQLite after
    /// some, nothing is committed and the result is [`TransactError::Commit`]. On SQLite the
    /// SDK takes the commit hook of the connection for this, and leaves it without one.
    ///
    /// The deadline ([`with_deadline`](Self::with_deadline)) bounds everything before the
    /// closure. Dropping the future before COMMIT rolls back, dropping it later changes nothing.
    pub async fn transact<DB, T, E, F>(
        &self,
        pool: &Pool<DB>,
        message: Message,
        business: F,
    ) -> Result<Outcome<T>, TransactError<E>>
    where
        DB: FenceDatabase,
        F: AsyncFnOnce(&mut Tx<DB>) -> Result<T, E>,
    {
        let ends = Instant::now() + self.deadline;
        let fence = self.shared.fences.identity(pool, ends).await?;
        let Some((mut tx, item)) = self.begin(pool, &message, fence, ends).await? else {
            return Ok(Outcome::AlreadyCommitted);
        };
        match business(&mut tx).await {
            Ok(value) => {
                self.commit(pool, tx, item).await?;
                Ok(Outcome::Committed(value))
            }
            Err(error) => {
                self.roll_back(pool, tx, item).await;
                Err(TransactError::Business(error))
            }
        }
    }

    /// Prepares and begins; with a new id if a check was faster. None: the key's holder is
    /// confirmed.
    async fn begin<DB: FenceDatabase, E>(
        &self,
        pool: &Pool<DB>,
        message: &Message,
        fence: FenceIdentity,
        ends: Instant,
    ) -> Result<Option<(Tx<DB>, NewMessage)>, TransactError<E>> {
        let mut restarts = 0;
        loop {
            let id = Uuid::now_v7();
            let item = message.to_wire(id, Some(fence));
            match self.prepare_until(id, &item, ends).await? {
                Prepared::Ready => match self.open(pool, id, &item, ends).await? {
                    Begun::Open(tx) => return Ok(Some((tx, item))),
                    Begun::Fenced(FenceVerdict::Committed) => {
                        // Only an id that was made twice gets here. Its business is done.
                        self.finish_in_task(pool, item, Settled::Committed);
                        return Ok(None);
                    }
                    Begun::Fenced(FenceVerdict::RolledBack) => {}
                },
                Prepared::HolderConfirmed => return Ok(None),
                Prepared::AlreadyCancelled => {}
            }
            if restarts == MAX_RESTARTS {
                return Err(TransactError::Fenced { message_id: id });
            }
            restarts += 1;
            tracing::info!(message.id = %id, "fenced before its business ran; starting again");
        }
    }

    async fn prepare_until<E>(
        &self,
        id: Uuid,
        item: &NewMessage,
        ends: Instant,
    ) -> Result<Prepared, TransactError<E>> {
        let began = Instant::now();
        let mut pace = Pace::new(id);
        let mut last: Option<Box<Refusal>> = None;
        loop {
            let refusal = match timeout_at(ends, self.prepare_once(item.clone())).await {
                Ok(Ok(())) => return Ok(Prepared::Ready),
                Ok(Err(refusal)) => refusal,
                Err(_) => last.take().unwrap_or_else(out_of_time),
            };
            let holder = match (refusal.reason(), refusal.state()) {
                (Some("KEY_HELD"), Some("CONFIRMED")) => return Ok(Prepared::HolderConfirmed),
                // It is being checked at this moment.
                (Some("KEY_HELD"), Some("PREPARED")) => refusal.other_message(),
                (Some("WRONG_STATE"), Some("CANCELLED")) => return Ok(Prepared::AlreadyCancelled),
                _ => None,
            };
            if holder.is_none() && !refusal.may_pass() {
                return Err(TransactError::Refused {
                    message_id: id,
                    refusal,
                });
            }
            let wait = pace.next().max(refusal.retry_after().unwrap_or_default());
            if Instant::now() + wait >= ends {
                return Err(match holder {
                    Some(holder) => TransactError::HolderUndecided { holder },
                    None => TransactError::Unavailable {
                        message_id: id,
                        waited_ms: waited_ms(began),
                        last: refusal,
                    },
                });
            }
            last = Some(refusal);
            sleep(wait).await;
        }
    }

    async fn open<DB: FenceDatabase, E>(
        &self,
        pool: &Pool<DB>,
        id: Uuid,
        item: &NewMessage,
        ends: Instant,
    ) -> Result<Begun<DB>, TransactError<E>> {
        hit(Point::PRODUCER_PREPARED);
        let opening = {
            let pool = pool.clone();
            // If nobody waits for it any more, its result is dropped, which rolls back.
            tokio::spawn(async move { begin_fenced(&pool, id, ends).await })
        };
        let begun = match timeout_at(ends, opening).await {
            Ok(Ok(begun)) => begun,
            Ok(Err(_)) => Err(sqlx::Error::WorkerCrashed),
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        };
        begun.map_err(|source| {
            // The business never ran; free the key without waiting for a check.
            self.abandon_in_task(pool, item.clone());
            TransactError::Begin {
                message_id: id,
                source,
            }
        })
    }

    /// Commits, and confirms behind it. Returns when the commit is certain and the confirm is
    /// answered or slow.
    async fn commit<DB: FenceDatabase, E>(
        &self,
        pool: &Pool<DB>,
        tx: Tx<DB>,
        item: NewMessage,
    ) -> Result<(), TransactError<E>> {
        let message_id = tx.message_id();
        let (tell, told) = oneshot::channel();
        let (producer, pool) = (self.clone(), pool.clone());
        let task = self.shared.tasks.spawn(async move {
            hit(Point::PRODUCER_BEFORE_COMMIT);
            let commit = match tx.commit().await {
                Ok(()) => Commit::Committed,
                Err(error) => ask_after_failed_commit(&pool, message_id, error).await,
            };
            let settled = match &commit {
                Commit::Committed => {
                    hit(Point::PRODUCER_AFTER_COMMIT);
                    Settled::Committed
                }
                Commit::RolledBack(_) => Settled::RolledBack,
                // Never cancel what may be committed.
                Commit::Unknown(_) => Settled::InProgress,
            };
            // The caller may be gone; the message is not.
            drop(tell.send(commit));
            producer.finish(item, message_id, settled).await;
        });
        let commit = told.await.unwrap_or_else(|_| {
            Commit::Unknown("the runtime ended while it was committing".to_owned())
        });
        match commit {
            Commit::Committed => {
                drop(timeout(CALLER_WAITS, task).await);
                Ok(())
            }
            Commit::RolledBack(source) => Err(TransactError::Commit { message_id, source }),
            Commit::Unknown(reason) => Err(TransactError::OutcomeUnknown { message_id, reason }),
        }
    }

    /// Rolls back, makes that final in the fence, and cancels. Returns when that is done or slow.
    async fn roll_back<DB: FenceDatabase>(&self, pool: &Pool<DB>, tx: Tx<DB>, item: NewMessage) {
        let (producer, pool) = (self.clone(), pool.clone());
        let task = self.shared.tasks.spawn(async move {
            let id = tx.message_id();
            if let Err(error) = tx.roll_back().await {
                // Its connection is not used again, and its end is another rollback.
                tracing::warn!(message.id = %id, %error, "the rollback of a business transaction failed");
            }
            hit(Point::PRODUCER_ROLLED_BACK);
            let settled = settle_patiently(&pool, id).await;
            hit(Point::PRODUCER_ROLLBACK_FENCED);
            producer.finish_settled(item, id, settled).await;
        });
        drop(timeout(CALLER_WAITS, task).await);
    }

    /// Fences and cancels a message whose business never ran.
    fn abandon_in_task<DB: FenceDatabase>(&self, pool: &Pool<DB>, item: NewMessage) {
        let (producer, pool) = (self.clone(), pool.clone());
        let Ok(id) = Uuid::from_slice(&item.id) else {
            return;
        };
        self.shared.tasks.spawn(async move {
            let settled = settle_patiently(&pool, id).await;
            producer.finish_settled(item, id, settled).await;
        });
    }

    fn finish_in_task<DB: FenceDatabase>(&self, _: &Pool<DB>, item: NewMessage, settled: Settled) {
        let producer = self.clone();
        let Ok(id) = Uuid::from_slice(&item.id) else {
            return;
        };
        self.shared
            .tasks
            .spawn(async move { producer.finish(item, id, settled).await });
    }

    async fn finish_settled(
        &self,
        item: NewMessage,
        id: Uuid,
        settled: Result<Settled, sqlx::Error>,
    ) {
        match settled {
            Ok(settled) => self.finish(item, id, settled).await,
            Err(error) => tracing::warn!(
                message.id = %id,
                %error,
                "the fence cannot be asked; the message is left to the status check"
            ),
        }
    }

    /// Tells Handfast what is final. What it cannot be told is left to the status check.
    async fn finish(&self, item: NewMessage, id: Uuid, settled: Settled) {
        match settled {
            Settled::Committed => {
                if !skips(Point::PRODUCER_LOSE_CONFIRM) {
                    self.confirm_or_publish(item, id).await;
                }
            }
            Settled::RolledBack => match self.cancel_until(id, self.confirm_budget).await {
                Ok(()) => {}
                Err(CallError::Refused { refusal, .. })
                    if refusal.code == Code::FailedPrecondition =>
                {
                    tracing::error!(message.id = %id, %refusal, "a rolled back message was confirmed");
                }
                // What Handfast does not have need not be cancelled, and what it was not told
                // it will ask.
                Err(error) => tracing::info!(message.id = %id, %error, "a cancel was not accepted"),
            },
            Settled::InProgress => {}
        }
    }

    async fn confirm_or_publish(&self, item: NewMessage, id: Uuid) {
        let mut result = self.confirm_until(id, self.confirm_budget).await;
        if let Err(CallError::Refused { refusal, .. }) = &result
            && refusal.code == Code::NotFound
        {
            // Its store has lost the prepare; we still have the message, and it is true.
            tracing::warn!(message.id = %id, "a committed message was not found; publishing it again");
            result = self.publish_until(id, item, self.confirm_budget).await;
        }
        match result {
            Ok(()) => hit(Point::PRODUCER_AFTER_CONFIRM),
            Err(CallError::Refused { refusal, .. }) => {
                tracing::error!(message.id = %id, %refusal, "the confirm of a committed message was refused");
            }
            Err(error @ CallError::Unavailable { .. }) => {
                tracing::warn!(message.id = %id, %error, "a confirm is left to the status check");
            }
        }
    }
}

/// Begins until `ends`; a begin that hangs then is given up with its connection.
async fn begin_fenced<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
    ends: Instant,
) -> Result<Begun<DB>, sqlx::Error> {
    let begun = until(ends, Tx::begin(pool, id)).await;
    if let Some(tx) = begun.unwrap_or(Err(sqlx::Error::PoolTimedOut))? {
        return Ok(Begun::Open(tx));
    }
    // What the row says is read as a check reads it.
    match settle_in_task(pool, id, Asker::Sdk).await? {
        Settled::Committed => Ok(Begun::Fenced(FenceVerdict::Committed)),
        Settled::RolledBack => Ok(Begun::Fenced(FenceVerdict::RolledBack)),
        Settled::InProgress => Err(sqlx::Error::PoolTimedOut),
    }
}

/// A commit that failed may have happened: only the fence knows.
async fn ask_after_failed_commit<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
    error: sqlx::Error,
) -> Commit {
    match settle_patiently(pool, id).await {
        Ok(Settled::Committed) => Commit::Committed,
        Ok(Settled::RolledBack) => Commit::RolledBack(error),
        Ok(Settled::InProgress) => Commit::Unknown(format!(
            "COMMIT failed ({error}) and the fence did not answer in {} ms",
            SETTLE_BUDGET.as_millis()
        )),
        Err(fence) => Commit::Unknown(format!(
            "COMMIT failed ({error}) and the fence could not be asked ({fence})"
        )),
    }
}

/// Asks the fence until it answers or the budget is used up.
async fn settle_patiently<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
) -> Result<Settled, sqlx::Error> {
    let ends = Instant::now() + SETTLE_BUDGET;
    let mut pace = Pace::new(id);
    loop {
        let asked = timeout_at(ends, settle_in_task(pool, id, Asker::Sdk)).await;
        let Ok(settled) = asked else {
            return Ok(Settled::InProgress);
        };
        if matches!(settled, Ok(Settled::Committed | Settled::RolledBack)) {
            return settled;
        }
        let wait = pace.next();
        if Instant::now() + wait >= ends {
            return settled;
        }
        sleep(wait).await;
    }
}
