//! The embedded engines: one SQLite file, no broker, and an inbox in SQLite.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, Tx, handfast as on_handfast};
use handfast_producer::Producer;
use serde_json::json;
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::options::Options;
use crate::rounds::{Figures, head};
use crate::service::Service;
use crate::topology::{PRODUCER, TOPIC, subscriptions};
use crate::{Failure, handfast, usage};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- embedded --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages of one round; on a machine of two processors the default takes about 10 s
    #[arg(long, value_name = "N", default_value_t = 150_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Producers' calls in flight
    #[arg(long, value_name = "N", default_value_t = 2_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    in_flight: u64,
}

/// Deliveries that the consumer holds, and what it takes in one transaction.
const PREFETCH: u32 = 1_000;
const BATCH: usize = 500;
/// The way of the last messages takes this long at most.
const LAST: Duration = Duration::from_secs(600);

/// Measures round by round. No server is needed.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let load_average = options.load_average()?;
    println!("load average at the start: {load_average}");
    let (mut rates, mut peak) = (Figures::default(), 0.0_f64);
    let (mut service, mut clients) = (Figures::default(), Figures::default());
    for round in 0..=options.rounds {
        eprintln!("round {round}");
        let run = one(&args).await?;
        eprintln!("round {round}: {:.0}/s", run.per_second);
        if round > 0 {
            rates.add(run.per_second);
            service.add(run.service_cpu_us);
            clients.add(run.clients_cpu_us);
            peak = peak.max(run.peak_mib);
        }
    }
    println!("{}", head("messages per second"));
    println!("{}", rates.row("embedded", 0));
    println!("{}", head("CPU us per message"));
    println!("{}", service.row("service", 0));
    println!("{}", clients.row("producers and consumer", 0));
    println!("peak memory of the service: {peak:.0} MiB");
    if options.json {
        let all = json!({
            "mode": "embedded",
            "handfast_per_s": rates.json(),
            "service_cpu_us_per_message": service.json(),
            "clients_cpu_us_per_message": clients.json(),
            "peak_memory_mib": peak,
            "messages": args.messages,
            "payload_bytes": options.payload,
            "in_flight": args.in_flight,
            "about": { "load_average": load_average },
        });
        println!("{all}");
    }
    Ok(())
}

/// What a round gave.
struct Run {
    per_second: f64,
    /// Microseconds of all processors together, per message.
    service_cpu_us: f64,
    /// The same of the producers and the consumer, which are this process.
    clients_cpu_us: f64,
    peak_mib: f64,
}

async fn one(args: &Args) -> Result<Run, Failure> {
    let folder = tempfile::TempDir::with_prefix("handfast-bench-");
    let folder = folder.map_err(Failure::of("make a folder"))?;
    let names = subscriptions(1);
    let service = Service::embedded(&names).await?;
    let producer = Producer::connect(service.url.clone(), PRODUCER).await;
    let producer = producer.map_err(Failure::of("connect to the service"))?;
    let inbox = SqliteConnectOptions::new()
        .filename(folder.path().join("inbox.sqlite"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let inbox = SqlitePoolOptions::new()
        .max_connections(2)
        .connect_with(inbox)
        .await;
    let inbox = inbox.map_err(Failure::of("open the inbox"))?;
    let (stop, applied) = (CancellationToken::new(), Arc::new(Applied::default()));
    let consumer = Consumer::connect(on_handfast(service.url.clone())).await;
    let consumer = consumer.map_err(Failure::of("consume"))?;
    let subscriber = consumer
        .subscription(TOPIC, &names[0])
        .inbox(inbox.clone())
        .prefetch(PREFETCH)
        .max_batch(BATCH);
    let consumer = tokio::spawn(subscriber.run_batch(Apply(applied.clone()), stop.clone()));
    // A first message, so that nothing is measured that happens once.
    let warm = producer.clone().with_deadline(Duration::from_secs(30));
    handfast::call(&warm, 1, 100, 1).await?;
    applied.wait(1).await?;

    let own_cpu_s = || usage::cpu_of(std::process::id());
    let (began, service_cpu_s, clients_cpu_s) = (Instant::now(), service.cpu_s()?, own_cpu_s()?);
    let payload = args.options.payload as usize;
    handfast::call(&producer, args.messages, payload, args.in_flight).await?;
    applied.wait(args.messages + 1).await?;
    // It ends when every answer was recorded.
    stop.cancel();
    let ended = consumer.await.map_err(Failure::of("end the consumer"))?;
    let report = ended.map_err(Failure::of("consume"))?;
    let took = began.elapsed();
    if report.unanswered > 0 {
        return Err(Failure(format!(
            "{} answers were not recorded",
            report.unanswered
        )));
    }
    let messages = args.messages as f64;
    let run = Run {
        per_second: messages / took.as_secs_f64(),
        service_cpu_us: (service.cpu_s()? - service_cpu_s) * 1e6 / messages,
        clients_cpu_us: (own_cpu_s()? - clients_cpu_s) * 1e6 / messages,
        peak_mib: service.peak_mib()?,
    };
    service.kill().await?;
    inbox.close().await;
    Ok(run)
}

#[derive(Debug, Default)]
struct Applied {
    count: AtomicU64,
    more: Notify,
}

impl Applied {
    async fn wait(&self, messages: u64) -> Result<(), Failure> {
        let all = async {
            while self.count.load(Ordering::SeqCst) < messages {
                self.more.notified().await;
            }
        };
        let all = tokio::time::timeout(LAST, all).await;
        all.map_err(|_| Failure(format!("not all were applied within {LAST:?}")))
    }
}

struct Apply(Arc<Applied>);

impl BatchHandler<Sqlite> for Apply {
    async fn handle_batch(&self, _: &mut Tx<Sqlite>, messages: &[Delivered]) -> Vec<Answer> {
        self.0
            .count
            .fetch_add(messages.len() as u64, Ordering::SeqCst);
        self.0.more.notify_one();
        messages.iter().map(|_| Answer::Consumed).collect()
    }
}
