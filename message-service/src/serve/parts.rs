//! Which part gets which: the store, the broker, the verbs and the passes.

use std::sync::Arc;
use std::time::Duration;

use rand::TryRngCore as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::engines::{Carrier, Opened};

use crate::answered::Answered;
use crate::broker::AnswerSink;
use crate::checker::{self, Checker};
use crate::clock::Clock;
use crate::config::Server;
use crate::look::Look;
use crate::pass;
use crate::presence::{Identity, Presence};
use crate::producer::grpc::{self, GrpcStatus};
use crate::recovery::{self, Recovery};
use crate::refresh::Refresh;
use crate::retention::{self, Retention};
use crate::service::{self, Service};
use crate::store::{Shared, Store};
use crate::topology::Snapshot;
use crate::turn::Turn;

/// A lease on a check outlives its call by at least this much.
const CHECK_MARGIN: Duration = Duration::from_secs(1);

/// Everything that runs behind the API.
pub(super) struct Parts {
    pub(super) store: Arc<dyn Store>,
    pub(super) carrier: Carrier,
    pub(super) service: Arc<Service>,
    checker: Arc<Checker>,
    recovery: Arc<Recovery>,
    retention: Arc<Retention>,
    refresh: Arc<Refresh>,
    look: Arc<Look>,
    pub(super) presence: Arc<Presence>,
    /// Who this process is.
    replica: Uuid,
    /// Ends the passes.
    pub(super) stop: CancellationToken,
    /// The passes that run.
    pub(super) passes: TaskTracker,
}

/// A number that no other start of this program has, for jitter and lease tokens.
pub(super) fn seed() -> Result<u64, rand::rand_core::OsError> {
    rand::rngs::OsRng.try_next_u64()
}

impl Parts {
    /// Joins the parts. Nothing runs yet.
    pub(super) fn assemble(
        server: &Server,
        opened: Opened,
        topology: Arc<Snapshot>,
        clock: Arc<dyn Clock>,
        identity: Identity,
    ) -> Self {
        let (seed, replica) = (identity.seed, identity.id);
        let answered = Arc::new(Answered::default());
        let carrier = Carrier::new(server, &opened, &topology, &clock, seed);
        let store = opened.store;
        let broker = carrier.port();
        let service = Service::new(
            Arc::clone(&store),
            Arc::clone(&topology),
            Arc::clone(&broker),
            Arc::clone(&answered),
            service::Settings {
                limits: server.limits,
                inflight_bytes: server.inflight_bytes,
                max_undecided: server.max_undecided,
                max_backlog_bytes: server.max_backlog_bytes,
            },
        );
        let reachability = service.reachability();
        let checker = Checker::new(
            Arc::clone(&store),
            Arc::clone(&broker),
            Arc::new(GrpcStatus::new(grpc::Settings {
                call_timeout: server.check_call,
                connect_timeout: grpc::Settings::default()
                    .connect_timeout
                    .min(server.check_call),
            })),
            Arc::clone(&topology),
            Arc::new(move |producer: &str, reachable| reachability.set(producer, reachable)),
            checker::Settings {
                lease: server.lease.max(server.check_call + CHECK_MARGIN),
                seed,
                ..checker::Settings::default()
            },
        );
        let recovery = Recovery::new(
            Arc::clone(&store),
            Arc::clone(&broker),
            Arc::clone(&answered),
            Arc::clone(&topology),
            Arc::clone(&clock),
            recovery::Settings {
                grace: server.start_grace,
                passed_by: server.passed_by,
                resend_after: server.resend_after,
                seed,
                ..recovery::Settings::default()
            },
        );
        let periods = retention::Settings::default();
        let retention = Retention::new(
            Arc::clone(&store),
            clock,
            retention::Settings {
                keep: server.retention,
                bucket_span: server.bucket,
                // Spans that are shorter than the usual period are somebody's test.
                period: periods.period.min(server.retention).min(server.bucket),
                seed,
            },
        );
        let refresh = Refresh::new(Arc::clone(&store), Arc::clone(&topology), seed);
        let look = Look::new(
            Arc::clone(&store),
            Arc::clone(&broker),
            Arc::clone(&checker),
            Arc::clone(&recovery),
            Arc::clone(&topology),
            seed,
        );
        let presence = Presence::new(
            Arc::clone(&store),
            broker,
            Arc::clone(&checker),
            answered,
            topology,
            Arc::clone(&refresh),
            Arc::clone(&recovery),
            identity,
        );
        Self {
            store,
            carrier,
            service,
            checker,
            recovery,
            retention,
            refresh,
            look,
            presence,
            replica,
            stop: CancellationToken::new(),
            passes: TaskTracker::new(),
        }
    }

    /// Starts the passes.
    pub(super) fn start(&self) {
        let (checker, recovery) = (Arc::clone(&self.checker), Arc::clone(&self.recovery));
        let (retention, refresh) = (Arc::clone(&self.retention), Arc::clone(&self.refresh));
        self.keep("checker", move |stop| Arc::clone(&checker).run(stop));
        let turn = self.turn(Shared::Recovery, self.recovery.period());
        self.keep("recovery", move |stop| {
            Arc::clone(&recovery).run(turn.clone(), stop)
        });
        let turn = self.turn(Shared::Retention, self.retention.period());
        self.keep("retention", move |stop| {
            Arc::clone(&retention).run(turn.clone(), stop)
        });
        let presence = Arc::clone(&self.presence);
        self.keep("presence", move |stop| Arc::clone(&presence).run(stop));
        self.keep("refresh", move |stop| Arc::clone(&refresh).run(stop));
        let look = Arc::clone(&self.look);
        self.keep("look", move |stop| Arc::clone(&look).run(stop));
        self.passes.close();
        let sink: Arc<dyn AnswerSink> = Arc::clone(&self.service) as _;
        self.carrier.start(sink);
    }

    /// This process's turn at a pass that one runs for all.
    fn turn(&self, pass: Shared, period: Duration) -> Turn {
        Turn::new(Arc::clone(&self.store), pass, self.replica, period)
    }

    /// Keeps a pass running until the stop.
    fn keep<F>(&self, name: &'static str, pass: impl Fn(CancellationToken) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = self.stop.clone();
        self.passes.spawn(pass::kept(name, stop, pass));
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("carrier", &self.carrier)
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}
