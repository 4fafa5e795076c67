//! The one writer: group commit on SQLite.
//!
//! SQLite has one writer at a time, so one task owns the one connection that writes. While a
//! commit is in flight, jobs queue up; the next transaction then takes what is there, in
//! slices of at most [`SLICE_ROWS`] rows or [`SLICE`]. No timer waits for company: the commit
//! in flight is the window.
//!
//! Jobs come in three classes. Decisions and answers go first, because refusing them would
//! turn overload into more work; prepare and publish follow; every transaction takes at least
//! one job of the passes, so that claims go on under load.
//!
//! A job is repeatable until it is committed. If one fails, the transaction is rolled back and
//! each of its jobs runs alone, so that only the failing one is told.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use handfast_fail_points::hit;
use rand::rngs::StdRng;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::time::StoreClock;
use crate::message::Timestamp;
use crate::store::Error;
pub(super) use crate::store::kind::Kind;

/// A transaction takes at most this many rows, and then what one job has too much.
pub(super) const SLICE_ROWS: usize = 500;
/// A transaction takes no further job after this long.
const SLICE: Duration = Duration::from_millis(5);
/// Jobs of one class that wait; a further one is refused.
const QUEUE_JOBS: usize = 4_096;
/// The wait before the connection is opened again after it broke.
const REOPEN_AFTER: Duration = Duration::from_millis(200);

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Decision,
    Call,
    Pass,
}

impl Class {
    const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Decide | Kind::Acknowledge | Kind::SettleChecks => Class::Decision,
            Kind::Prepare | Kind::Publish => Class::Call,
            Kind::Topology
            | Kind::ClaimChecks
            | Kind::Claim
            | Kind::Sent
            | Kind::Return
            | Kind::Recover
            | Kind::Retire
            | Kind::Announce
            | Kind::Turn => Class::Pass,
        }
    }
}

/// The open transaction that a job writes in.
pub(super) struct Tx {
    pub(super) db: SqliteConnection,
    /// The time of this transaction.
    pub(super) now: Timestamp,
    /// Draws jitter and tokens.
    pub(super) rng: StdRng,
}

type Run = Box<dyn for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<(), Error>> + Send + Sync>;

struct Job {
    kind: Kind,
    rows: usize,
    run: Run,
    done: Box<dyn FnOnce(Result<(), Error>) + Send + Sync>,
}

/// The handle to the writer task.
pub(super) struct Writer {
    queues: Mutex<Option<Queues>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone)]
struct Queues {
    decisions: mpsc::Sender<Job>,
    calls: mpsc::Sender<Job>,
    passes: mpsc::Sender<Job>,
}

impl Writer {
    /// Starts the task with its connection.
    pub(super) fn start(
        db: SqliteConnection,
        options: SqliteConnectOptions,
        clock: Arc<StoreClock>,
        rng: StdRng,
    ) -> Self {
        let (decisions, decided) = mpsc::channel(QUEUE_JOBS);
        let (calls, called) = mpsc::channel(QUEUE_JOBS);
        let (passes, passed) = mpsc::channel(QUEUE_JOBS);
        let now = clock.now();
        let task = Task {
            inbox: Inbox {
                decisions: decided,
                calls: called,
                passes: passed,
            },
            tx: Tx { db, now, rng },
            broken: false,
            options,
            clock,
        };
        Self {
            queues: Mutex::new(Some(Queues {
                decisions,
                calls,
                passes,
            })),
            task: Mutex::new(Some(tokio::spawn(task.run()))),
        }
    }

    /// Runs a job and returns once it is durable. Dropping the future does not stop the job.
    pub(super) async fn write<T, F>(&self, kind: Kind, rows: usize, job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, Error>> + Send + Sync + 'static,
    {
        let (done, durable) = oneshot::channel();
        let result = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&result);
        let job = Arc::new(job);
        let run: Run = Box::new(move |tx| {
            let (job, slot) = (Arc::clone(&job), Arc::clone(&slot));
            Box::pin(async move {
                let value = job(tx).await?;
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
                Ok(())
            })
        });
        let done = Box::new(move |outcome: Result<(), Error>| {
            let value = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            let reply = match (outcome, value) {
                (Ok(()), Some(value)) => Ok(value),
                (Ok(()), None) => Err(Error::Busy {
                    doing: kind.doing(),
                    why: "is stopping",
                }),
                (Err(error), _) => Err(error),
            };
            // The caller may have gone away; its job is done all the same.
            drop(done.send(reply));
        });
        self.send(Job {
            kind,
            rows,
            run,
            done,
        })?;
        durable.await.unwrap_or(Err(Error::Busy {
            doing: kind.doing(),
            why: "is stopping",
        }))
    }

    fn send(&self, job: Job) -> Result<(), Error> {
        let doing = job.kind.doing();
        let queues = self
            .queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(queues) = queues else {
            return Err(Error::Busy {
                doing,
                why: "is stopping",
            });
        };
        let queue = match Class::of(job.kind) {
            Class::Decision => queues.decisions,
            Class::Call => queues.calls,
            Class::Pass => queues.passes,
        };
        queue.try_send(job).map_err(|_| Error::Busy {
            doing,
            why: "has too much to do",
        })
    }

    /// Takes no further job, finishes what is queued, and closes the connection.
    pub(super) async fn close(&self) {
        drop(
            self.queues
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            // A panic of the task was reported by the panic hook; there is nothing to close.
            drop(task.await);
        }
    }
}

struct Inbox {
    decisions: mpsc::Receiver<Job>,
    calls: mpsc::Receiver<Job>,
    passes: mpsc::Receiver<Job>,
}

impl Inbox {
    /// Waits for a job; `None` once all senders are gone and the queues are empty.
    async fn first(&mut self) -> Option<Job> {
        tokio::select! {
            biased;
            Some(job) = self.decisions.recv() => Some(job),
            Some(job) = self.calls.recv() => Some(job),
            Some(job) = self.passes.recv() => Some(job),
            else => None,
        }
    }

    /// The next job that is there, passes only if asked for.
    fn next(&mut self, passes: bool) -> Option<Job> {
        if passes && let Ok(job) = self.passes.try_recv() {
            return Some(job);
        }
        self.decisions
            .try_recv()
            .or_else(|_| self.calls.try_recv())
            .ok()
    }
}

struct Task {
    inbox: Inbox,
    tx: Tx,
    /// The connection failed in a way that only opening it again can heal.
    broken: bool,
    options: SqliteConnectOptions,
    clock: Arc<StoreClock>,
}

impl Task {
    async fn run(mut self) {
        while let Some(first) = self.inbox.first().await {
            self.transaction(first).await;
        }
        if let Err(error) = self.tx.db.close().await {
            tracing::warn!(%error, "cannot close the store cleanly");
        }
    }

    /// One transaction with the first job and whatever else is there.
    async fn transaction(&mut self, first: Job) {
        let mut jobs = Vec::new();
        let mut failure = self.begin(first.kind).await.err();
        // A database that cannot begin fails everybody who waits, not one after the other.
        let doomed = failure.is_some();
        let began = Instant::now();
        let mut rows = 0;
        let mut next = Some(first);
        let mut passes = false;
        while let Some(job) = next.take() {
            rows += job.rows.max(1);
            passes |= Class::of(job.kind) == Class::Pass;
            if failure.is_none() {
                failure = (job.run)(&mut self.tx).await.err();
            }
            jobs.push(job);
            if (doomed || failure.is_none()) && rows < SLICE_ROWS && began.elapsed() < SLICE {
                // One pass job per transaction is enough; while there are calls, they go on.
                next = self.inbox.next(!passes).or_else(|| self.inbox.next(true));
            }
        }
        if failure.is_none() {
            failure = self.commit(&jobs).await.err();
        }
        match failure {
            None => finish(jobs, || Ok(())),
            Some(error) => self.recover(jobs, error).await,
        }
    }

    /// Rolls back; then either nobody could have succeeded, or each job runs alone.
    async fn recover(&mut self, mut jobs: Vec<Job>, error: Error) {
        self.rollback().await;
        if jobs.len() == 1 {
            if let Some(job) = jobs.pop() {
                (job.done)(Err(error));
            }
            return;
        }
        if let Error::Unavailable { source, .. } = &error {
            let text = source.to_string();
            for job in jobs {
                let source = sqlx::Error::Io(std::io::Error::other(text.clone()));
                (job.done)(Err(Error::Unavailable {
                    doing: job.kind.doing(),
                    source,
                }));
            }
            return;
        }
        for job in jobs {
            let outcome = self.alone(&job).await;
            if outcome.is_err() {
                self.rollback().await;
            }
            (job.done)(outcome);
        }
    }

    async fn alone(&mut self, job: &Job) -> Result<(), Error> {
        self.begin(job.kind).await?;
        (job.run)(&mut self.tx).await?;
        self.commit(std::slice::from_ref(job)).await
    }

    async fn begin(&mut self, kind: Kind) -> Result<(), Error> {
        let doing = kind.doing();
        if self.broken {
            let opened = self.options.connect().await;
            match opened {
                Ok(db) => self.tx.db = db,
                Err(source) => {
                    tokio::time::sleep(REOPEN_AFTER).await;
                    return Err(Error::Unavailable { doing, source });
                }
            }
            self.broken = false;
        }
        // IMMEDIATE takes the write lock now, so that no later statement finds it taken.
        sqlx::query("BEGIN IMMEDIATE")
            .execute(&mut self.tx.db)
            .await
            .map_err(|source| Error::Unavailable { doing, source })?;
        self.tx.now = self.clock.now();
        Ok(())
    }

    async fn commit(&mut self, jobs: &[Job]) -> Result<(), Error> {
        let doing = jobs.first().map_or("write", |job| job.kind.doing());
        // Time never goes back behind what was written, so what was written is written down.
        sqlx::query("-- remember the time\nUPDATE store SET last_time = ? WHERE last_time < ?")
            .bind(self.tx.now.as_micros())
            .bind(self.tx.now.as_micros())
            .execute(&mut self.tx.db)
            .await
            .map_err(|source| Error::Unavailable { doing, source })?;
        for job in jobs {
            hit(job.kind.points().0);
        }
        sqlx::query("COMMIT")
            .execute(&mut self.tx.db)
            .await
            .map_err(|source| Error::Unavailable { doing, source })?;
        for job in jobs {
            hit(job.kind.points().1);
        }
        Ok(())
    }

    async fn rollback(&mut self) {
        match sqlx::query("ROLLBACK").execute(&mut self.tx.db).await {
            // SQLite itself rolls back on some errors, and then there is nothing to roll back.
            Ok(_) | Err(sqlx::Error::Database(_)) => {}
            Err(_) => self.broken = true,
        }
    }
}

fn finish(jobs: Vec<Job>, outcome: impl Fn() -> Result<(), Error>) {
    for job in jobs {
        (job.done)(outcome());
    }
}
