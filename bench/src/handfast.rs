//! Handfast as its users run it: the service as a process of its own, producers and consumers with
//! the SDKs in this one.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, Tx, rabbitmq};
use handfast_producer::{Message, Producer};
use handfast_service::config::{Config, Settings};
use handfast_service::{serve as service, telemetry};
use sqlx::Postgres;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Failure;
use crate::place::Place;
use crate::topology::{PRODUCER, TOPIC, tables};
use crate::usage;

/// How this program is told to be a message service.
pub(crate) const SUBCOMMAND: &str = "run-service";
/// A start takes this long at most, and so does the way of the first message.
const START: Duration = Duration::from_secs(30);
/// Between two looks at whether all answers are durable.
const LOOK: Duration = Duration::from_millis(50);

/// Runs the message service in this process.
pub(crate) async fn serve(config: PathBuf) -> Result<(), Failure> {
    let config = Config::load(&config, Settings::default());
    let config = config.map_err(Failure::of("read the configuration"))?;
    telemetry::install(&config.server.log, config.server.log_format).map_err(Failure::of("log"))?;
    let served = service::serve(config, CancellationToken::new()).await;
    served.map_err(Failure::of("serve"))
}

/// What is told of every delivery: its payload.
pub(crate) trait Seen: Fn(&[u8]) + Clone + Send + Sync + 'static {}

impl<F: Fn(&[u8]) + Clone + Send + Sync + 'static> Seen for F {}

/// A service with its consumers.
pub(crate) struct Running {
    pub(crate) producer: Producer,
    process: Child,
    store: PgPool,
    inbox: PgPool,
    stop: CancellationToken,
    consumers: Vec<JoinHandle<Result<handfast_consumer::Report, handfast_consumer::Error>>>,
    /// Deliveries that were applied, of all subscriptions.
    applied: Arc<Applied>,
    _folder: TempDir,
}

#[derive(Debug, Default)]
struct Applied {
    count: AtomicU64,
    more: Notify,
}

impl Running {
    /// Starts all of it, and returns when a first message has made its way.
    pub(crate) async fn start(
        place: &Place,
        subscriptions: &[String],
        seen: impl Seen,
    ) -> Result<Self, Failure> {
        let folder = TempDir::with_prefix("handfast-bench-");
        let folder = folder.map_err(Failure::of("make a folder"))?;
        let (process, url) = start_service(place, subscriptions, &folder).await?;
        let producer = Producer::connect(url, PRODUCER).await;
        let producer = producer.map_err(Failure::of("connect to the service"))?;
        let pool = async |url: &str| {
            let pool = PgPoolOptions::new().max_connections(4 * subscriptions.len() as u32);
            let pool = pool.connect(url).await;
            pool.map_err(Failure::of("connect to PostgreSQL"))
        };
        let (store, inbox) = (pool(&place.store).await?, pool(&place.inbox).await?);
        let (stop, applied) = (CancellationToken::new(), Arc::new(Applied::default()));
        let mut consumers = Vec::new();
        for name in subscriptions {
            let source = rabbitmq(place.amqp.clone()).deployment(place.deployment.clone());
            let consumer = Consumer::connect(source).await;
            let consumer = consumer.map_err(Failure::of("consume"))?;
            let subscriber = consumer.subscription(TOPIC, name).inbox(inbox.clone());
            let apply = Apply(seen.clone(), applied.clone());
            consumers.push(tokio::spawn(subscriber.run_batch(apply, stop.clone())));
        }
        let mut running = Self {
            producer,
            process,
            store,
            inbox,
            stop,
            consumers,
            applied,
            _folder: folder,
        };
        running.first_message(subscriptions.len() as u64).await?;
        Ok(running)
    }

    async fn first_message(&mut self, subscriptions: u64) -> Result<(), Failure> {
        let producer = self.producer.clone().with_deadline(START);
        let published = producer.publish(&Message::new(TOPIC)).await;
        published.map_err(Failure::of("publish the first message"))?;
        let applied = tokio::time::timeout(START, self.all_applied(subscriptions)).await;
        applied.map_err(|_| Failure(format!("the first message took more than {START:?}")))?
    }

    /// Waits until so many deliveries were applied and every answer is durable. The first
    /// message counts.
    pub(crate) async fn all_applied(&mut self, deliveries: u64) -> Result<(), Failure> {
        while self.applied.count.load(Ordering::SeqCst) < deliveries {
            tokio::select! {
                () = self.applied.more.notified() => {}
                ended = self.process.wait() => {
                    return Err(Failure(format!("the service ended: {ended:?}")));
                }
            }
        }
        loop {
            let open = "SELECT EXISTS (SELECT FROM delivery WHERE state IN ('PENDING', 'SENT'))";
            let open: bool = sqlx::query_scalar(open)
                .fetch_one(&self.store)
                .await
                .map_err(Failure::of("look for open deliveries"))?;
            if !open {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The most memory that the service has had, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<f64, Failure> {
        let pid = self.process.id();
        usage::peak_mib(pid.ok_or_else(|| Failure("the service has ended".to_owned()))?)
    }

    /// Ends all of it.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        self.stop.cancel();
        for consumer in self.consumers {
            let ended = consumer.await.map_err(Failure::of("end a consumer"))?;
            ended.map_err(Failure::of("consume"))?;
        }
        // What it has promised is durable, and its database goes next.
        let killed = self.process.kill().await;
        killed.map_err(Failure::of("end the service"))?;
        self.store.close().await;
        self.inbox.close().await;
        Ok(())
    }
}

/// Starts the service, and says where it is.
async fn start_service(
    place: &Place,
    subscriptions: &[String],
    folder: &TempDir,
) -> Result<(Child, String), Failure> {
    let port = TcpListener::bind("127.0.0.1:0").await;
    let address = port.and_then(|port| port.local_addr());
    let address = address.map_err(Failure::of("find a free port"))?;
    let file = folder.path().join("handfast.toml");
    let Place {
        store,
        amqp,
        deployment,
        ..
    } = place;
    let text = format!(
        "topology_version = 1\n\n[server]\nlisten = \"{address}\"\nstore = \"{store}\"\n\
         broker = \"{amqp}\"\ndeployment = \"{deployment}\"\nlog = \"warn\"\n\n{}",
        tables(subscriptions)
    );
    std::fs::write(&file, text).map_err(Failure::of("write the configuration"))?;
    let this = std::env::current_exe().map_err(Failure::of("find this program"))?;
    let process = Command::new(this)
        .arg(SUBCOMMAND)
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let process = process.map_err(Failure::of("start the service"))?;
    Ok((process, format!("http://{address}")))
}

/// Applies everything, with no effect but the inbox row.
struct Apply<S>(S, Arc<Applied>);

impl<S: Seen> BatchHandler<Postgres> for Apply<S> {
    async fn handle_batch(&self, _: &mut Tx<Postgres>, messages: &[Delivered]) -> Vec<Answer> {
        for message in messages {
            (self.0)(&message.payload);
        }
        let all = messages.len() as u64;
        self.1.count.fetch_add(all, Ordering::SeqCst);
        self.1.more.notify_one();
        messages.iter().map(|_| Answer::Consumed).collect()
    }
}

/// Prepares and confirms so many messages, each by a caller that waits for both, and so many
/// callers at a time; returns when every delivery is answered.
pub(crate) async fn load(
    running: &mut Running,
    subscriptions: u64,
    messages: u64,
    payload: usize,
    in_flight: u64,
) -> Result<Duration, Failure> {
    let message = Message::new(TOPIC).payload("application/octet-stream", vec![b'x'; payload]);
    let message = Arc::new(message);
    let next = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..in_flight.min(messages) {
        let (next, message) = (next.clone(), message.clone());
        let producer = running.producer.clone();
        callers.spawn(async move {
            while next.fetch_add(1, Ordering::Relaxed) < messages {
                let id = uuid::Uuid::now_v7();
                producer.prepare(id, &message, None).await?;
                producer.confirm(id).await?;
            }
            Ok::<(), handfast_producer::CallError>(())
        });
    }
    while let Some(done) = callers.join_next().await {
        let done = done.map_err(Failure::of("call"))?;
        done.map_err(Failure::of("prepare and confirm"))?;
    }
    // The first message of the start counts, too.
    running.all_applied((messages + 1) * subscriptions).await?;
    Ok(began.elapsed())
}
