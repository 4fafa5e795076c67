//! The two pairs of engines: what differs between them, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use super::Error;
use crate::broker::embedded::{self, Embedded};
use crate::broker::rabbitmq::{self, RabbitMq};
use crate::broker::{AnswerSink, Broker};
use crate::clock::Clock;
use crate::config::{Engines, Server};
use crate::store::Store;
use crate::store::postgres::{Address, PostgresStore};
use crate::store::sqlite::SqliteStore;
use crate::topology::Snapshot;

/// How long a start waits for RabbitMQ before it goes on without.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// A store that was opened, and who it is.
pub(super) struct Opened {
    pub(super) store: Arc<dyn Store>,
    identity: uuid::Uuid,
}

impl Opened {
    /// Opens the store of the pair.
    pub(super) async fn open(
        server: &Server,
        clock: Arc<dyn Clock>,
        seed: u64,
    ) -> Result<Self, Error> {
        Ok(match &server.engines {
            Engines::Embedded { file } => Self {
                store: Arc::new(SqliteStore::open(file, clock, seed).await?),
                identity: uuid::Uuid::nil(),
            },
            Engines::Production { store, .. } => {
                let store =
                    PostgresStore::open(store.as_str().parse::<Address>()?, clock, seed).await?;
                Self {
                    identity: store.identity(),
                    store: Arc::new(store),
                }
            }
        })
    }
}

/// The broker of the pair.
#[derive(Clone, Debug)]
pub(super) enum Carrier {
    Embedded(Arc<Embedded>),
    RabbitMq(Arc<RabbitMq>),
}

impl Carrier {
    pub(super) fn new(
        server: &Server,
        opened: &Opened,
        topology: &Arc<Snapshot>,
        clock: &Arc<dyn Clock>,
        seed: u64,
    ) -> Self {
        let store = Arc::clone(&opened.store);
        let (topology, clock) = (Arc::clone(topology), Arc::clone(clock));
        match &server.engines {
            Engines::Embedded { .. } => Self::Embedded(Embedded::new(
                store,
                topology,
                clock,
                embedded::Settings {
                    lease: server.lease,
                    resend_after: server.resend_after,
                    ..embedded::Settings::default()
                },
            )),
            Engines::Production {
                broker, deployment, ..
            } => Self::RabbitMq(RabbitMq::new(
                store,
                topology,
                clock,
                rabbitmq::Settings {
                    addresses: broker.clone(),
                    deployment: deployment.clone(),
                    store: opened.identity,
                    publisher_confirm: server.publisher_confirm,
                    lease: server.lease,
                    resend_after: server.resend_after,
                    seed,
                },
            )),
        }
    }

    /// What the passes and the service see of it.
    pub(super) fn port(&self) -> Arc<dyn Broker> {
        match self {
            Self::Embedded(embedded) => Arc::clone(embedded) as Arc<dyn Broker>,
            Self::RabbitMq(rabbit) => Arc::clone(rabbit) as Arc<dyn Broker>,
        }
    }

    /// The broker that serves streams, if it is that one.
    pub(super) fn embedded(&self) -> Option<Arc<Embedded>> {
        match self {
            Self::Embedded(embedded) => Some(Arc::clone(embedded)),
            Self::RabbitMq(_) => None,
        }
    }

    /// Connects, and refuses what is not ours.
    pub(super) async fn connect(&self, removed: &[String]) -> Result<(), rabbitmq::Refused> {
        match self {
            Self::Embedded(_) => Ok(()),
            Self::RabbitMq(rabbit) => rabbit.connect(removed, CONNECT_WITHIN).await,
        }
    }

    /// Begins to carry.
    pub(super) fn start(&self, sink: Arc<dyn AnswerSink>) {
        match self {
            // Its streams begin when consumers open them.
            Self::Embedded(_) => {}
            Self::RabbitMq(rabbit) => rabbit.start(sink),
        }
    }

    /// Ends in good order; consumers on streams may answer for `answers_within`.
    pub(super) async fn shutdown(&self, answers_within: Duration) {
        match self {
            Self::Embedded(embedded) => embedded.shutdown(answers_within).await,
            Self::RabbitMq(rabbit) => rabbit.shutdown().await,
        }
    }
}
