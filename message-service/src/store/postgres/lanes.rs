//! The lanes: group commit on PostgreSQL.
//!
//! Each kind of write has one task that owns one connection. While a commit is in flight, calls
//! queue up; the next statement then takes what is there, bounded by rows and bytes, and writes
//! it at once. No timer waits for company: the commit in flight is the window.
//!
//! A call belongs to its lane once it is queued: it is done or not done as a whole, whoever still
//! waits. If what one call brought cannot be written, or waits for a locked row, the batch is
//! halved until only that call is told.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use handfast_fail_points::hit;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::marks::Marks;
use super::session::{Session, Trouble, trouble};
use crate::store::Error;
use crate::store::kind::Kind;

/// A batch takes at most this many rows, and then what one call has too much.
pub(super) const BATCH_ROWS: usize = 500;
/// A batch takes at most this many bytes of bodies, and then what one call has too much.
const BATCH_BYTES: usize = 4 << 20;
/// Calls of one lane that wait; a further one is refused.
const QUEUE_CALLS: usize = 4_096;
/// How long closing waits for what is queued.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// What a lane does with its calls.
pub(super) trait Work: Send + Sync + 'static {
    type Call: Send + Sync + 'static;
    type Reply: Send + 'static;

    /// Names errors and fail points.
    fn kind(&self) -> Kind;

    /// Rows and bytes that a call writes.
    fn size(call: &Self::Call) -> (usize, usize);

    /// Whether calls are joined in one statement. Those of other lanes run one by one.
    const JOINS: bool = true;

    /// Does what all these calls want, and answers each. The outer error is everybody's: what
    /// was done before it is done, and a repeat finds it done.
    fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> impl Future<Output = Result<Replies<Self::Reply>, sqlx::Error>> + Send;
}

/// One per call, in order.
pub(super) type Replies<T> = Vec<Result<T, Error>>;

struct Job<W: Work> {
    call: W::Call,
    done: oneshot::Sender<Result<W::Reply, Error>>,
}

/// The handle to one lane.
pub(super) struct Lane<W: Work> {
    kind: Kind,
    queue: Mutex<Option<mpsc::Sender<Job<W>>>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl<W: Work> Lane<W> {
    pub(super) fn start(work: W, session: Session, marks: &Arc<Marks>) -> Self {
        let (queue, queued) = mpsc::channel(QUEUE_CALLS);
        let kind = work.kind();
        let task = Task {
            work,
            session,
            marks: Arc::clone(marks),
            queued,
            next: None,
        };
        Self {
            kind,
            queue: Mutex::new(Some(queue)),
            task: Mutex::new(Some(tokio::spawn(task.run()))),
        }
    }

    /// Queues a call and returns once it is durable. Dropping the future does not stop it.
    pub(super) async fn call(&self, call: W::Call) -> Result<W::Reply, Error> {
        let busy = |why| Error::Busy {
            doing: self.kind.doing(),
            why,
        };
        let queue = self
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| busy("is stopping"))?;
        let (done, durable) = oneshot::channel();
        queue
            .try_send(Job { call, done })
            .map_err(|_| busy("has too much to do"))?;
        drop(queue);
        durable.await.unwrap_or_else(|_| Err(busy("is stopping")))
    }

    /// Takes no further call, finishes what is queued, and closes the connection.
    pub(super) async fn close(&self) {
        drop(
            self.queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task
            && timeout(CLOSE_TIMEOUT, task).await.is_err()
        {
            tracing::warn!(doing = self.kind.doing(), "a lane did not end in time");
        }
    }
}

struct Task<W: Work> {
    work: W,
    session: Session,
    marks: Arc<Marks>,
    queued: mpsc::Receiver<Job<W>>,
    /// A call that did not fit into the last batch.
    next: Option<Job<W>>,
}

impl<W: Work> Task<W> {
    async fn run(mut self) {
        while let Some(first) = self.first().await {
            let batch = self.batch(first);
            self.answer(batch).await;
        }
        self.session.close().await;
    }

    async fn first(&mut self) -> Option<Job<W>> {
        match self.next.take() {
            Some(job) => Some(job),
            None => self.queued.recv().await,
        }
    }

    /// The first call and whatever else is there.
    fn batch(&mut self, first: Job<W>) -> Vec<Job<W>> {
        let (mut rows, mut bytes) = W::size(&first.call);
        let mut batch = vec![first];
        while W::JOINS
            && let Ok(job) = self.queued.try_recv()
        {
            let (more_rows, more_bytes) = W::size(&job.call);
            rows += more_rows;
            bytes += more_bytes;
            if rows > BATCH_ROWS || bytes > BATCH_BYTES {
                self.next = Some(job);
                break;
            }
            batch.push(job);
        }
        batch
    }

    async fn answer(&mut self, batch: Vec<Job<W>>) {
        let (calls, waiting): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|job| (job.call, job.done)).unzip();
        let replies = self.halve(&calls).await;
        for (done, reply) in waiting.into_iter().zip(replies) {
            // The caller may have gone away; its call is done all the same.
            drop(done.send(reply));
        }
    }

    /// Runs a batch; if a part of it cannot be done, that part is found by halving.
    async fn halve(&mut self, calls: &[W::Call]) -> Replies<W::Reply> {
        let mut replies = Vec::with_capacity(calls.len());
        let mut parts = vec![calls];
        while let Some(part) = parts.pop() {
            match self.part(part).await {
                Ok(answers) => replies.extend(answers),
                Err(error) if part.len() > 1 && is_somebodys(&error) => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => replies.extend(part.iter().map(|_| Err(self.told(&error)))),
            }
        }
        replies
    }

    async fn part(&mut self, calls: &[W::Call]) -> Result<Replies<W::Reply>, sqlx::Error> {
        let (before, after) = self.work.kind().points();
        for _ in calls {
            hit(before);
        }
        self.session.be_patient();
        let began = Instant::now();
        let done = self.work.run(&mut self.session, calls).await;
        if self.work.kind().makes_due() {
            self.marks.wrote(done.is_ok().then(|| began.elapsed()));
        }
        let answers = done?;
        for _ in calls {
            hit(after);
        }
        Ok(answers)
    }

    /// One error, told to each of many.
    fn told(&self, cause: &sqlx::Error) -> Error {
        let doing = self.work.kind().doing();
        if trouble(cause) == Trouble::Poison {
            return Error::Inconsistent {
                doing,
                what: cause.to_string(),
            };
        }
        let source = sqlx::Error::Io(std::io::Error::other(cause.to_string()));
        Error::Unavailable { doing, source }
    }
}

/// True if one call of a batch is to blame, and the others can go on without it.
fn is_somebodys(error: &sqlx::Error) -> bool {
    match trouble(error) {
        Trouble::Poison | Trouble::Locked => true,
        Trouble::Repeat | Trouble::NoSuchTable | Trouble::Unavailable => false,
    }
}
