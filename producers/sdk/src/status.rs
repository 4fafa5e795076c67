//! The server that Handfast asks: what became of these messages?
//!
//! It answers from the fences it was given, one short transaction per message. What it cannot
//! be sure of it does not decide: another database's fence, and messages older than the fence
//! remembers, are UNKNOWN. Producers without SQL transactions answer by [`BusinessStatus`].

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use handfast_proto::v1::business_status_server::{
    BusinessStatus as BusinessStatusApi, BusinessStatusServer,
};
use handfast_proto::v1::{self, CheckRequest, CheckResponse, VerdictKind};
use handfast_proto::{MAX_CALL_BYTES, MAX_QUESTIONS};
use sqlx::Pool;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use uuid::Uuid;

use crate::fence::{
    Asker, DEFAULT_RETENTION, Fence, FenceDatabase, FenceError, FenceIdentity, Settled, micros,
    settle_in_task,
};
use crate::incoming::connections;

/// A call ends after this; what it did not reach is IN_PROGRESS.
const CALL_BUDGET: Duration = Duration::from_millis(1_900);
/// Calls at one moment; Handfast needs one.
const MAX_CALLS: usize = 8;
/// Subtracted from the retention, because two clocks take part.
const RETENTION_MARGIN: Duration = Duration::from_secs(24 * 60 * 60);
const PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// Pruning waits while the database's clock and ours disagree by more than this.
const CLOCK_TOLERANCE_US: i64 = 60_000_000;
/// Open connections are given this long at a shutdown.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(5);
const MAX_CONCURRENT_STREAMS: u32 = 200;
const MAX_LOCAL_ERROR_RESETS: usize = 1_024;
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// One question of a status check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The message that was prepared.
    pub message_id: Uuid,
    /// Its topic.
    pub topic: String,
    /// Its key, if it has one.
    pub key: Option<String>,
    /// When it was prepared, in microseconds since 1970 UTC by Handfast's clock.
    pub prepared_at_us: i64,
}

/// The answer to a [`Question`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The transaction committed, and that will not change.
    Committed,
    /// The transaction rolled back and can never commit.
    RolledBack,
    /// Not decided yet; ask again.
    InProgress,
    /// It cannot be told. "Not found" is this, never [`RolledBack`](Self::RolledBack), unless
    /// it is made impossible that the transaction still commits.
    Unknown,
}

/// What a producer without a fence implements.
#[async_trait]
pub trait BusinessStatus: Send + Sync + 'static {
    /// What became of the business transaction of one prepared message. Has 2 s together with
    /// the other questions of a call; what it does not reach is IN_PROGRESS. It may be dropped
    /// half-way, so database work belongs into a task of its own.
    async fn status(&self, question: Question) -> Answer;
}

/// Why the status server does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatusServerError {
    /// It would answer anybody.
    #[error(
        "cannot serve status checks on {address}: it is not a loopback address; \
         allow it with `--insecure-listen`"
    )]
    NotLoopback {
        /// As given.
        address: SocketAddr,
    },
    /// The port is taken, or the address is not of this machine.
    #[error("cannot serve status checks on {address}: {source}")]
    Listen {
        /// As given.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A fence cannot be relied on.
    #[error("cannot serve status checks: {0}")]
    Fence(#[from] FenceError),
    /// The connections failed.
    #[error("cannot serve status checks: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves `BusinessStatus.Check`, and prunes the fences it was given once an hour.
#[must_use]
pub struct StatusServer {
    fences: Vec<Box<dyn UnopenedFence>>,
    business: Option<Arc<dyn BusinessStatus>>,
    insecure_listen: bool,
    retention: Duration,
}

impl StatusServer {
    /// A server that answers UNKNOWN to everything, until it is given fences.
    pub fn new() -> Self {
        Self {
            fences: Vec::new(),
            business: None,
            insecure_listen: false,
            retention: DEFAULT_RETENTION,
        }
    }

    /// Answers for the fence in this database, too. The checks use connections of their own,
    /// two at most, made as the pool makes its, `after_connect` included.
    pub fn fence<DB: FenceDatabase>(mut self, pool: Pool<DB>) -> Self {
        self.fences.push(Box::new(pool));
        self
    }

    /// Answers by the producer's own code for messages that were prepared without a fence.
    pub fn answered_by(mut self, business: impl BusinessStatus) -> Self {
        self.business = Some(Arc::new(business));
        self
    }

    /// Allows an address that is not loopback, though there is no authentication.
    pub fn insecure_listen(mut self, allow: bool) -> Self {
        self.insecure_listen = allow;
        self
    }

    /// Sets how long the fences remember (default 30 days): older rows are pruned, and what
    /// was prepared longer ago than this less a day is UNKNOWN.
    pub fn remembers(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// Listens on `address` and serves until `shutdown`.
    pub async fn serve(
        self,
        address: SocketAddr,
        shutdown: CancellationToken,
    ) -> Result<(), StatusServerError> {
        self.refuse_if_open_to_all(address)?;
        let listener =
            TcpListener::bind(address)
                .await
                .map_err(|source| StatusServerError::Listen {
                    address: address.to_string(),
                    source,
                })?;
        self.serve_on(listener, shutdown).await
    }

    /// Serves on a listener that exists, until `shutdown`. Calls in flight are finished.
    pub async fn serve_on(
        self,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<(), StatusServerError> {
        let address = listener
            .local_addr()
            .map_err(|source| StatusServerError::Listen {
                address: "the given listener".to_owned(),
                source,
            })?;
        self.refuse_if_open_to_all(address)?;

        let mut fences = Vec::new();
        for fence in &self.fences {
            fences.push(fence.open().await?);
        }
        let stop_pruning = shutdown.child_token();
        let _stops_with_us = stop_pruning.clone().drop_guard();
        for fence in &fences {
            let (fence, stop, retention) =
                (Arc::clone(fence), stop_pruning.clone(), self.retention);
            tokio::spawn(async move {
                stop.run_until_cancelled(prune_hourly(fence, retention))
                    .await
            });
        }

        let checks = Checks {
            sources: Arc::new(Sources {
                fences,
                business: self.business,
                remembers_us: micros(self.retention.saturating_sub(RETENTION_MARGIN)),
            }),
            calls: Semaphore::new(MAX_CALLS),
        };
        let service = BusinessStatusServer::new(checks).max_decoding_message_size(MAX_CALL_BYTES);
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .http2_max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
            .add_service(service)
            .serve_with_incoming_shutdown(
                connections(listener),
                shutdown.clone().cancelled_owned(),
            );
        let too_long = async {
            shutdown.cancelled().await;
            tokio::time::sleep(SHUTDOWN_WAIT).await;
        };
        tokio::select! {
            served = serving => Ok(served?),
            // A client that does not let go must not keep the process.
            () = too_long => Ok(()),
        }
    }

    fn refuse_if_open_to_all(&self, address: SocketAddr) -> Result<(), StatusServerError> {
        if address.ip().is_loopback() || self.insecure_listen {
            Ok(())
        } else {
            Err(StatusServerError::NotLoopback { address })
        }
    }
}

impl Default for StatusServer {
    fn default() -> Self {
        Self::new()
    }
}

/// A pool whose fence is opened when the server starts.
#[async_trait]
trait UnopenedFence: Send + Sync {
    async fn open(&self) -> Result<Arc<dyn AnyFence>, FenceError>;
}

#[async_trait]
impl<DB: FenceDatabase> UnopenedFence for Pool<DB> {
    async fn open(&self) -> Result<Arc<dyn AnyFence>, FenceError> {
        Ok(Arc::new(Fence::open(self).await?.for_checks().await?))
    }
}

/// A fence in whatever database, as the checks see it.
#[async_trait]
trait AnyFence: Send + Sync {
    fn identity(&self) -> FenceIdentity;
    async fn now_us(&self) -> Result<i64, sqlx::Error>;
    async fn settle(&self, id: Uuid) -> Result<Settled, sqlx::Error>;
    async fn prune(&self, retention: Duration) -> Result<u64, FenceError>;
}

#[async_trait]
impl<DB: FenceDatabase> AnyFence for Fence<DB> {
    fn identity(&self) -> FenceIdentity {
        self.identity
    }

    async fn now_us(&self) -> Result<i64, sqlx::Error> {
        Self::now_us(self).await
    }

    async fn settle(&self, id: Uuid) -> Result<Settled, sqlx::Error> {
        settle_in_task(&self.pool, id, Asker::Check).await
    }

    async fn prune(&self, retention: Duration) -> Result<u64, FenceError> {
        Self::prune(self, retention).await
    }
}

/// Removes what is too old, unless the database's clock has jumped: then it waits.
async fn prune_hourly(fence: Arc<dyn AnyFence>, retention: Duration) {
    let mut last: Option<(Instant, i64)> = None;
    loop {
        match fence.now_us().await {
            Ok(now_us) => {
                let seen = Instant::now();
                let steady = last.is_some_and(|(then, then_us)| {
                    let jump = (now_us - then_us) - micros(seen - then);
                    jump.abs() <= CLOCK_TOLERANCE_US
                });
                if steady {
                    match fence.prune(retention).await {
                        Ok(0) => {}
                        Ok(rows) => tracing::info!(rows, "pruned the fence"),
                        Err(error) => tracing::warn!(%error, "the fence was not pruned"),
                    }
                } else if last.is_some() {
                    tracing::error!(
                        "the database's clock has jumped; the fence is not pruned for an hour"
                    );
                }
                last = Some((seen, now_us));
            }
            Err(error) => tracing::warn!(%error, "the fence was not pruned"),
        }
        tokio::time::sleep(PRUNE_INTERVAL).await;
    }
}

struct Checks {
    sources: Arc<Sources>,
    calls: Semaphore,
}

struct Sources {
    fences: Vec<Arc<dyn AnyFence>>,
    business: Option<Arc<dyn BusinessStatus>>,
    remembers_us: i64,
}

#[async_trait]
impl BusinessStatusApi for Checks {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let questions = request.into_inner().questions;
        if questions.len() > MAX_QUESTIONS {
            return Err(too_many_questions(questions.len()));
        }
        let Ok(_permit) = self.calls.try_acquire() else {
            return Err(Status::resource_exhausted(format!(
                "{MAX_CALLS} status checks are running"
            )));
        };
        let ends = Instant::now() + CALL_BUDGET;
        let mut seen = HashSet::new();
        let questions: Vec<_> = questions
            .into_iter()
            .filter(|question| seen.insert(question.message_id.clone()))
            .collect();
        let reached = Arc::new(Mutex::new(Vec::with_capacity(questions.len())));
        let answering = {
            let (sources, reached) = (Arc::clone(&self.sources), Arc::clone(&reached));
            let questions = questions.clone();
            // Not this future: it is dropped when the caller hangs up.
            tokio::spawn(async move {
                for question in questions {
                    if Instant::now() >= ends {
                        return;
                    }
                    let kind = sources.answer(question, ends).await;
                    reached
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(kind);
                }
            })
        };
        drop(timeout_at(ends, answering).await);
        let reached = reached.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = reached
            .iter()
            .copied()
            .chain(std::iter::repeat(VerdictKind::InProgress));
        let verdicts = questions.into_iter().zip(kinds);
        let verdicts = verdicts.map(|(question, kind)| v1::Verdict {
            message_id: question.message_id,
            kind: kind.into(),
        });
        Ok(Response::new(CheckResponse {
            verdicts: verdicts.collect(),
        }))
    }
}

impl Sources {
    async fn answer(&self, question: v1::Question, ends: Instant) -> VerdictKind {
        let id = match Uuid::from_slice(&question.message_id) {
            Ok(id) if !id.is_nil() => id,
            _ => return VerdictKind::Unknown,
        };
        if question.fence.is_empty() {
            return self.ask_business(id, question, ends).await;
        }
        let Some(fence) = self
            .fences
            .iter()
            .find(|fence| fence.identity().as_bytes()[..] == question.fence[..])
        else {
            // Another database's transaction: a row here would prove nothing.
            return VerdictKind::Unknown;
        };
        match self
            .ask_fence(fence.as_ref(), id, question.prepared_at)
            .await
        {
            Ok(kind) => kind,
            Err(error) => {
                // Unset does not count as answered: the fault is ours, not the message's.
                tracing::warn!(message.id = %id, %error, "a status check could not ask the fence");
                VerdictKind::Unspecified
            }
        }
    }

    async fn ask_fence(
        &self,
        fence: &dyn AnyFence,
        id: Uuid,
        prepared_at_us: i64,
    ) -> Result<VerdictKind, sqlx::Error> {
        let age_us = fence.now_us().await?.saturating_sub(prepared_at_us);
        if age_us > self.remembers_us {
            // Its row may have been pruned, and an absent row would read as a rollback.
            return Ok(VerdictKind::Unknown);
        }
        Ok(match fence.settle(id).await? {
            Settled::Committed => VerdictKind::Committed,
            Settled::RolledBack => VerdictKind::RolledBack,
            Settled::InProgress => VerdictKind::InProgress,
        })
    }

    async fn ask_business(
        &self,
        message_id: Uuid,
        question: v1::Question,
        ends: Instant,
    ) -> VerdictKind {
        let Some(business) = &self.business else {
            return VerdictKind::Unknown;
        };
        let asked = business.status(Question {
            message_id,
            topic: question.topic,
            key: question.key,
            prepared_at_us: question.prepared_at,
        });
        match timeout(ends.saturating_duration_since(Instant::now()), asked).await {
            Ok(Answer::Committed) => VerdictKind::Committed,
            Ok(Answer::RolledBack) => VerdictKind::RolledBack,
            Ok(Answer::Unknown) => VerdictKind::Unknown,
            Ok(Answer::InProgress) | Err(_) => VerdictKind::InProgress,
        }
    }
}

fn too_many_questions(count: usize) -> Status {
    let limit = format!("has {count} items, at most {MAX_QUESTIONS} are allowed");
    Status::with_error_details(
        tonic::Code::InvalidArgument,
        format!("cannot answer {count} questions in one call"),
        ErrorDetails::with_bad_request_violation("questions", limit),
    )
}
