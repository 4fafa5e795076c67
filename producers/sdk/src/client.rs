//! The producer's connection to Handfast, and its verbs one by one.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use handfast_proto::v1::{MessageStatus, NewMessage};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;
use tonic::Status;
use uuid::Uuid;

use crate::batch::Lane;
use crate::endpoints::Endpoints;
use crate::error::{CallError, ConnectError, Refusal};
use crate::fence::{FenceIdentity, KnownFences};
use crate::message::Message;
use crate::pace::Pace;
use crate::verbs::{Cancel, Confirm, Get, Prepare, Publish, Verb};

const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);
const DEFAULT_CONFIRM_BUDGET: Duration = Duration::from_secs(5);
const MAX_NAME_BYTES: usize = 100;

/// One registered producer. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Producer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) deadline: Duration,
    pub(crate) confirm_budget: Duration,
}

pub(crate) struct Shared {
    name: String,
    prepare: Lane<Prepare>,
    publish: Lane<Publish>,
    confirm: Lane<Confirm>,
    cancel: Lane<Cancel>,
    get: Lane<Get>,
    /// Commits, confirms and cancels that go on though their caller may be gone.
    pub(crate) tasks: TaskTracker,
    pub(crate) fences: KnownFences,
    /// Ends everything that sends when the last clone is gone.
    _stop: DropGuard,
}

impl Producer {
    /// A producer with this registered name at `urls`: `http://127.0.0.1:7400`, or several that
    /// are separated by commas, at most 16.
    ///
    /// Several are used in turn. One at which a call failed is left alone until it says that it
    /// is serving. Every verb is safe to repeat, so what failed there is repeated elsewhere, at a
    /// pace that slows down and is spread by chance, until the deadline.
    ///
    /// Connections are made when they are first needed and whenever they were lost, so Handfast
    /// may start later. Must be called on a tokio runtime that lives as long as the producer.
    #[expect(
        clippy::unused_async,
        reason = "it needs a runtime, and may come to need the network"
    )]
    pub async fn connect(
        urls: impl Into<String>,
        name: impl Into<String>,
    ) -> Result<Self, ConnectError> {
        let (urls, name) = (urls.into(), name.into());
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(ConnectError::Name { name });
        }
        let (endpoints, stop) = Endpoints::read(&urls)?;
        let shared = Shared {
            prepare: Lane::start(&endpoints, &name),
            publish: Lane::start(&endpoints, &name),
            confirm: Lane::start(&endpoints, &name),
            cancel: Lane::start(&endpoints, &name),
            get: Lane::start(&endpoints, &name),
            tasks: TaskTracker::new(),
            fences: KnownFences::default(),
            _stop: stop,
            name,
        };
        Ok(Self {
            shared: Arc::new(shared),
            deadline: DEFAULT_DEADLINE,
            confirm_budget: DEFAULT_CONFIRM_BUDGET,
        })
    }

    /// The same producer with another deadline (default 10 s) for the verbs below, and for
    /// everything in [`transact`](Self::transact) that comes before the closure.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The same producer with another time (default 5 s) for which a confirm or a cancel after
    /// a transaction is repeated before it is left to the status check.
    #[must_use]
    pub fn with_confirm_budget(mut self, budget: Duration) -> Self {
        self.confirm_budget = budget;
        self
    }

    /// The name it is registered under.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Hands a fact over that is already true, under a new id, and returns the id. After OK it
    /// is durable and on its way. Repeated while Handfast cannot be reached, within the deadline.
    pub async fn publish(&self, message: &Message) -> Result<Uuid, CallError> {
        let id = Uuid::now_v7();
        self.publish_as(id, message).await?;
        Ok(id)
    }

    /// Publishes under an id of the caller's choice, so that it can be repeated safely.
    pub async fn publish_as(&self, id: Uuid, message: &Message) -> Result<(), CallError> {
        let item = message.to_wire(id, None);
        self.publish_until(id, item, self.deadline).await
    }

    /// Prepares a message under an id of the caller's choice, to be confirmed or cancelled.
    ///
    /// [`transact`](Self::transact) does this and all the rest. By hand, the caller answers
    /// for what [`BusinessStatus`](crate::BusinessStatus) says about the id.
    pub async fn prepare(
        &self,
        id: Uuid,
        message: &Message,
        fence: Option<FenceIdentity>,
    ) -> Result<(), CallError> {
        let item = message.to_wire(id, fence);
        let ends = Instant::now() + self.deadline;
        self.repeat(&self.shared.prepare, id, item, ends).await?;
        Ok(())
    }

    /// Says that the transaction of a prepared message committed.
    pub async fn confirm(&self, id: Uuid) -> Result<(), CallError> {
        self.confirm_until(id, self.deadline).await
    }

    /// Says that the transaction of a prepared message rolled back, and never will commit.
    pub async fn cancel(&self, id: Uuid) -> Result<(), CallError> {
        self.cancel_until(id, self.deadline).await
    }

    /// What became of one of this producer's messages.
    pub async fn get(&self, id: Uuid) -> Result<MessageStatus, CallError> {
        let ends = Instant::now() + self.deadline;
        let item = id.as_bytes().to_vec();
        self.repeat(&self.shared.get, id, item, ends).await
    }

    /// Waits until every transaction that is committing or rolling back is confirmed or
    /// cancelled, or left to the status check after the confirm budget. Call it before the
    /// process ends and after the last `transact`.
    pub async fn drain(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.tasks.reopen();
    }

    pub(crate) async fn prepare_once(&self, item: NewMessage) -> Result<(), Box<Refusal>> {
        self.shared.prepare.send(item).await.map(drop)
    }

    pub(crate) async fn publish_until(
        &self,
        id: Uuid,
        item: NewMessage,
        budget: Duration,
    ) -> Result<(), CallError> {
        let ends = Instant::now() + budget;
        self.repeat(&self.shared.publish, id, item, ends).await?;
        Ok(())
    }

    pub(crate) async fn confirm_until(&self, id: Uuid, budget: Duration) -> Result<(), CallError> {
        let ends = Instant::now() + budget;
        let item = id.as_bytes().to_vec();
        self.repeat(&self.shared.confirm, id, item, ends).await?;
        Ok(())
    }

    pub(crate) async fn cancel_until(&self, id: Uuid, budget: Duration) -> Result<(), CallError> {
        let ends = Instant::now() + budget;
        let item = id.as_bytes().to_vec();
        self.repeat(&self.shared.cancel, id, item, ends).await?;
        Ok(())
    }

    /// Sends until it is answered for good or the time is over. Every verb is safe to repeat.
    async fn repeat<V: Verb>(
        &self,
        lane: &Lane<V>,
        message_id: Uuid,
        item: V::Item,
        ends: Instant,
    ) -> Result<V::Reply, CallError> {
        let began = Instant::now();
        let mut pace = Pace::new(message_id);
        let mut last = None;
        loop {
            let refusal = match timeout_at(ends, lane.send(item.clone())).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(refusal)) => refusal,
                // What an earlier try met says more than that the time is over.
                Err(_) => last.take().unwrap_or_else(out_of_time),
            };
            if !refusal.may_pass() {
                return Err(CallError::Refused {
                    verb: V::NAME,
                    message_id,
                    refusal,
                });
            }
            let wait = pace.next().max(refusal.retry_after().unwrap_or_default());
            if Instant::now() + wait >= ends {
                return Err(CallError::Unavailable {
                    verb: V::NAME,
                    message_id,
                    waited_ms: waited_ms(began),
                    last: refusal,
                });
            }
            last = Some(refusal);
            sleep(wait).await;
        }
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

pub(crate) fn out_of_time() -> Box<Refusal> {
    Box::new(Refusal::from_call(&Status::deadline_exceeded(
        "the deadline has passed",
    )))
}

pub(crate) fn waited_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
