//! Puts the service together, and takes it apart in the right order.

use std::net::SocketAddr;
use std::time::Duration;

use handfast_producer::incoming::connections;
use handfast_producer::{
    ConnectError, FenceDatabase, FenceError, Producer, StatusServer, StatusServerError,
};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Postgres, Sqlite};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::api::Api;
use crate::database::Database;
use crate::job;
use crate::options::Options;
use crate::pay::Payments;
use crate::store::{Records, Store, postgres};
use crate::v1::payment_server::PaymentServer;

/// The name under which Handfast knows this producer.
pub const PRODUCER: &str = "payment";

/// What is in flight at a shutdown is given this long.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(25);
/// A payment has this long beside the deadline, which bounds what comes before its business.
const BUSINESS_DEADLINE: Duration = Duration::from_secs(30);
/// The job leaves a payment alone at least this long.
const MIN_JOB_AFTER: Duration = Duration::from_secs(1);
/// A database that is not there is looked for this often.
const DATABASE_RETRY: Duration = Duration::from_millis(500);
const MAX_CALL_BYTES: usize = 64 * 1024;
const MAX_CONCURRENT_STREAMS: u32 = 200;
const MAX_LOCAL_ERROR_RESETS: usize = 1_024;
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// Why the service does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It would serve anybody.
    #[error(
        "cannot serve payments on {address}: it is not a loopback address; \
         allow it with `--insecure-listen`"
    )]
    NotLoopback {
        /// As given.
        address: SocketAddr,
    },
    /// The port is taken, or the address is not of this machine.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As given.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// It cannot be opened or written.
    #[error("cannot open the database {database}: {source}")]
    Database {
        /// As given.
        database: Database,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The fence in the database cannot be used.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// Handfast's address is not one.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The status server stopped.
    #[error(transparent)]
    Status(#[from] StatusServerError),
    /// The payment API stopped.
    #[error("cannot serve payments: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl Error {
    /// True if only the database's server is not there yet.
    fn may_pass(&self) -> bool {
        match self {
            Self::Database { source, .. } => postgres::may_pass(source),
            Self::Fence(FenceError::Database { source, .. }) => postgres::may_pass(source),
            _ => false,
        }
    }
}

/// Listens where `options` say and serves until `shutdown`; see [`serve`].
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), Error> {
    let listener = listen(options.listen, options.insecure_listen).await?;
    let status_listener = listen(options.status_listen, options.insecure_listen).await?;
    serve(options, listener, status_listener, shutdown).await
}

/// Serves the payment API, the status server and the job until `shutdown`, or until one of
/// the servers fails. Handfast need not be there, and a PostgreSQL server is waited for.
///
/// At a shutdown calls in flight are answered, their confirms sent, and the status server
/// stops last; after 25 s what is left is left to the job and to the status check.
pub async fn serve(
    options: Options,
    listener: TcpListener,
    status_listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    match options.database.clone() {
        Database::File(path) => {
            let store = Store::<Sqlite>::open(&path).await?;
            serve_from(store, options, listener, status_listener, shutdown).await
        }
        Database::Server(server) => {
            let Some(store) = shutdown.run_until_cancelled(opened(&server)).await else {
                return Ok(());
            };
            serve_from(store?, options, listener, status_listener, shutdown).await
        }
    }
}

/// Opens a database as soon as its server lets it.
async fn opened(server: &PgConnectOptions) -> Result<Store<Postgres>, Error> {
    let mut said = false;
    loop {
        let error = match Store::<Postgres>::open(server).await {
            Err(error) if error.may_pass() => error,
            opened => return opened,
        };
        if !said {
            tracing::warn!(%error, "waiting for the database");
            said = true;
        }
        tokio::time::sleep(DATABASE_RETRY).await;
    }
}

async fn serve_from<D: FenceDatabase>(
    store: Store<D>,
    options: Options,
    listener: TcpListener,
    status_listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    Store<D>: Records<Database = D>,
{
    let producer = Producer::connect(&options.service, PRODUCER)
        .await?
        .with_deadline(options.pay_deadline());
    let job_after = (2 * options.job_interval()).max(MIN_JOB_AFTER);
    let payments = Payments::new(store.clone(), producer.clone(), job_after)
        .giving_up_after(options.pay_deadline() + BUSINESS_DEADLINE);

    let status_address = status_listener.local_addr().ok();

    // Ends when the caller says so, or when one of the parts has failed.
    let stop = shutdown.child_token();
    let status_stop = CancellationToken::new();
    let status = {
        let (stop, status_stop) = (stop.clone(), status_stop.clone());
        let server = StatusServer::new()
            .fence(store.writer.clone())
            .insecure_listen(options.insecure_listen);
        tokio::spawn(async move {
            let served = server.serve_on(status_listener, status_stop).await;
            stop.cancel();
            served
        })
    };
    let job = tokio::spawn(job::run_until(
        payments.clone(),
        options.job_interval(),
        stop.clone(),
    ));
    tracing::info!(
        listen = ?listener.local_addr().ok(),
        status_listen = ?status_address,
        database = %options.database,
        "payment serves"
    );

    let api = Api::new(payments.clone(), options.pay_deadline());
    let serving = Server::builder()
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .add_service(PaymentServer::new(api).max_decoding_message_size(MAX_CALL_BYTES))
        .serve_with_incoming_shutdown(connections(listener), stop.clone().cancelled_owned());
    let served = finished_in_time(serving, &stop).await;
    stop.cancel();

    let rest = async {
        drop(job.await);
        payments.tasks.close();
        payments.tasks.wait().await;
        producer.drain().await;
    };
    if timeout(SHUTDOWN_DEADLINE, rest).await.is_err() {
        tracing::warn!("payments in flight are left to the next start");
    }
    status_stop.cancel();
    if let Ok(status) = status.await {
        status?;
    }
    store.close().await;
    Ok(served?)
}

/// Waits for a server; after a stop, only as long as a shutdown may take.
async fn finished_in_time(
    serving: impl Future<Output = Result<(), tonic::transport::Error>>,
    stop: &CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let too_long = async {
        stop.cancelled().await;
        tokio::time::sleep(SHUTDOWN_DEADLINE).await;
    };
    tokio::select! {
        served = serving => served,
        () = too_long => Ok(()),
    }
}

async fn listen(address: SocketAddr, insecure: bool) -> Result<TcpListener, Error> {
    if !address.ip().is_loopback() && !insecure {
        return Err(Error::NotLoopback { address });
    }
    TcpListener::bind(address)
        .await
        .map_err(|source| Error::Listen { address, source })
}
