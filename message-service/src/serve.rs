//! The wiring: from a checked configuration to a running service, and to its end.
//!
//! A start refuses what it can refuse before it touches anything: the address, then the port,
//! then the store with its lock, then the topology. Only then does it serve. What is broken
//! later (a full disk, a producer that is down) does not end the process: calls are answered
//! UNAVAILABLE and passes try again.

mod engines;
mod parts;
mod shutdown;

use std::net::SocketAddr;
use std::sync::Arc;

use handfast_proto::v1::{console_server, deliveries_server, messages_server};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::api;
use crate::broker::rabbitmq;
use crate::clock::SystemClock;
use crate::config::{Config, Server};
use crate::presence::Identity;
use crate::store::{self, Applied, Store};
use crate::topology::{Snapshot, Topology};
use engines::Opened;
use parts::Parts;

/// The largest request of the health service that is read, in bytes: a service's name.
const HEALTH_REQUEST_BYTES: usize = 4 * 1024;
/// How long no connection is accepted after the host refused one, for example because too
/// many files are open.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
/// What the health service knows by name. The empty name is the whole server.
const SERVICES: [&str; 4] = [
    "",
    messages_server::SERVICE_NAME,
    deliveries_server::SERVICE_NAME,
    console_server::SERVICE_NAME,
];

/// Why the service did not start, or ended by itself. Each is one line with the way out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Anybody in the network could call.
    #[error(
        "cannot serve on {0}: nobody is authenticated yet, so only loopback is served; \
         use --listen 127.0.0.1:{port}, or --insecure-listen where everybody who can connect \
         is trusted", port = .0.port()
    )]
    NotLoopback(SocketAddr),
    /// The port is taken, or the address is not this host's.
    #[error(
        "cannot serve on {listen}: {source}; stop what uses the port, or choose another address \
         with --listen"
    )]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// What the host said.
        source: std::io::Error,
    },
    /// The host gave no random numbers.
    #[error("cannot draw a random seed from the host: {0}; see that /dev/urandom can be read")]
    Seed(rand::rand_core::OsError),
    /// The SQLite store refused to open.
    #[error(transparent)]
    Sqlite(#[from] store::sqlite::OpenError),
    /// The PostgreSQL store refused to open.
    #[error(transparent)]
    Postgres(#[from] store::postgres::OpenError),
    /// RabbitMQ holds something that is not ours.
    #[error(transparent)]
    RabbitMq(#[from] rabbitmq::Refused),
    /// The topology was refused, or could not be read or written.
    #[error("cannot apply the topology: {0}")]
    Topology(store::Error),
    /// The descriptors of the contract cannot be served.
    #[error("cannot serve reflection: {0}; start without it")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server ended although nobody asked for it.
    #[error("the server on {listen} ended by itself: {why}; start it again")]
    Ended {
        /// The address.
        listen: SocketAddr,
        /// What it said.
        why: String,
    },
}

/// Starts, logs the address, and serves until `stop` is cancelled; then ends in good order
/// within `shutdown_deadline`, which is success.
pub async fn serve(config: Config, stop: CancellationToken) -> Result<(), Error> {
    let running = Running::start(config).await?;
    let address = running.address();
    tracing::info!(%address, "serving on {address}");
    running.until(stop).await
}

/// A service that answers calls.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    parts: Parts,
    health: HealthReporter,
    /// Cancelled: no new connection, and open ones end with their last call.
    no_more_calls: CancellationToken,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    shutdown_deadline: std::time::Duration,
}

impl Running {
    /// Returns when calls are answered and every service is SERVING.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let Config { server, topology } = config;
        let listener = listen(&server).await?;
        let address = listener.local_addr().map_err(|source| Error::Listen {
            listen: server.listen,
            source,
        })?;
        let seed = parts::seed().map_err(Error::Seed)?;
        let clock = Arc::new(SystemClock::new());
        let opened = Opened::open(&server, clock.clone(), seed).await?;
        let applied = match apply(opened.store.as_ref(), topology).await {
            Ok(applied) => applied,
            Err(error) => {
                opened.store.close().await;
                return Err(Error::Topology(error));
            }
        };
        let snapshot = Arc::new(Snapshot::new(applied.in_force));
        let parts = Parts::assemble(&server, opened, snapshot, clock, identity(address, seed));
        if let Err(refused) = parts.carrier.connect(&applied.removed).await {
            parts.store.close().await;
            return Err(refused.into());
        }
        let options = api::Options {
            reflection: server.reflection || address.ip().is_loopback(),
        };
        let health = HealthReporter::new();
        for service in SERVICES {
            health
                .set_service_status(service, ServingStatus::Serving)
                .await;
        }
        let health_service = HealthService::from_health_reporter(health.clone());
        let routes = api::router(
            Arc::clone(&parts.service),
            parts.carrier.embedded(),
            options,
        )?
        .add_service(
            HealthServer::new(health_service).max_decoding_message_size(HEALTH_REQUEST_BYTES),
        );
        let no_more_calls = CancellationToken::new();
        let server_task = tokio::spawn(
            api::server_builder()
                .add_routes(routes)
                .serve_with_incoming_shutdown(
                    connections(listener),
                    no_more_calls.clone().cancelled_owned(),
                ),
        );
        parts.start();
        Ok(Self {
            address,
            parts,
            health,
            no_more_calls,
            server: server_task,
            shutdown_deadline: server.shutdown_deadline,
        })
    }

    /// The address that is served, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Who this process is for the others on its store.
fn identity(address: SocketAddr, seed: u64) -> Identity {
    let mut chance = StdRng::seed_from_u64(seed);
    Identity {
        id: uuid::Builder::from_random_bytes(chance.random()).into_uuid(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address: address.to_string(),
        seed,
    }
}

/// Takes the port, unless strangers could reach it.
async fn listen(server: &Server) -> Result<TcpListener, Error> {
    let listen = server.listen;
    if !listen.ip().is_loopback() && !server.insecure_listen {
        return Err(Error::NotLoopback(listen));
    }
    TcpListener::bind(listen)
        .await
        .map_err(|source| Error::Listen { listen, source })
}

/// Accepts connections. A host that is out of files refuses every try at once, so a refusal
/// is followed by a pause.
fn connections(
    listener: TcpListener,
) -> impl futures_util::Stream<Item = std::io::Result<TcpStream>> + Send {
    futures_util::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // Without it, small replies wait for a timer. The connection works
                    // either way.
                    let _ = connection.set_nodelay(true);
                    return Some((Ok(connection), listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// What a start did with the topology.
struct Applying {
    /// The one in force now.
    in_force: Topology,
    /// Subscriptions that were in force once and are not any more: their queues may be left.
    removed: Vec<String>,
}

/// Puts the file's topology in force, if it has one and it is not older, and reads the one
/// that is.
async fn apply(store: &dyn Store, topology: Option<Topology>) -> Result<Applying, store::Error> {
    if let Some(topology) = topology {
        let version = topology.version;
        match store.apply_topology(topology).await? {
            Applied::Changed => tracing::info!(version, "topology {version} is in force now"),
            Applied::Unchanged => tracing::info!(version, "topology {version} is in force"),
            Applied::Older { in_force } => tracing::warn!(
                version,
                in_force,
                "topology {version} is older than {in_force}, which is in force, and is not \
                 applied"
            ),
        }
    }
    let in_force = store.topology().await?;
    if in_force.version == 0 {
        tracing::warn!(
            "no topology is in force, so no producer is known; add [[producer]], [[topic]] and \
             [[subscription]] to the configuration file"
        );
    }
    Ok(Applying {
        removed: store.removed_subscriptions().await?,
        in_force,
    })
}
