//! Many deliveries that wait for a subscription without a consumer, beside a healthy one.

use std::time::{Duration, Instant};

use handfast_service::store::{Lane, Store as _};
use serde_json::json;

use crate::fill::{self, Kind};
use crate::handfast::{self, Plan, Running};
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::{Failure, topology};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- waiting --waiting 1000000")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Deliveries that wait for the subscription without a consumer
    #[arg(long, value_name = "N", default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    waiting: u64,

    /// Deliveries that are due for the healthy one in each round
    #[arg(long, value_name = "N", default_value_t = 1_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    due: u64,

    /// Messages that the healthy one is then sent through the service
    #[arg(long, value_name = "N", default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,
}

/// A claim as the relay makes it.
const BATCH: usize = 200;
const BATCH_BYTES: usize = 8 << 20;
const LEASE: Duration = Duration::from_secs(30);

/// Measures claims round by round, and then the service.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    fill::check_space(servers.postgres_folder(), args.waiting)?;
    let payload = options.payload as usize;
    let place = Place::make(&servers).await?;
    let (healthy, asleep) = ("sink-1".to_owned(), topology::ASLEEP.to_owned());
    let names = [healthy.clone(), asleep.clone()];
    fill::schema(&place, &names).await?;
    fill::load(&place, &asleep, Kind::Waiting, args.waiting, payload).await?;
    let store = fill::open(&place).await?;
    let (mut claims, mut passes) = (Figures::default(), Figures::default());
    for round in 0..=options.rounds {
        fill::load(&place, &healthy, Kind::Waiting, args.due, payload).await?;
        let (mut claimed, mut longest) = (0, Duration::ZERO);
        let began = Instant::now();
        while claimed < args.due {
            let limit = Lane::Normal {
                limit: BATCH,
                max_bytes: BATCH_BYTES,
            };
            let one = Instant::now();
            let some = store.claim_deliveries(&healthy, limit, LEASE * 100).await;
            let some = some.map_err(Failure::of("claim"))?.deliveries.len();
            longest = longest.max(one.elapsed());
            claimed += some as u64;
            if some == 0 {
                return Err(Failure(format!("{claimed} of {} were claimed", args.due)));
            }
        }
        if round > 0 {
            claims.add(longest.as_secs_f64() * 1e3);
            passes.add(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    store.close().await;
    let mut db = fill::connect(&place).await?;
    let touched: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM delivery WHERE subscription = $1 AND (token IS NOT NULL OR generation <> 0)",
    )
    .bind(&asleep)
    .fetch_one(&mut db)
    .await
    .map_err(Failure::of("count what was touched"))?;
    // What was claimed here is nobody's to send.
    sqlx::query("DELETE FROM delivery WHERE subscription = $1")
        .bind(&healthy)
        .execute(&mut db)
        .await
        .map_err(Failure::of("clear up"))?;
    let plan = Plan {
        consumed: vec![healthy],
        unattended: vec![asleep],
        large_batches: true,
        ..Plan::default()
    };
    let mut running = Running::start(&place, plan, |_| {}).await?;
    let messages = args.messages;
    let took = running
        .load(messages, async |running| {
            handfast::call(&running.producer, messages, payload, 2_000).await
        })
        .await?;
    let per_second = messages as f64 / took.as_secs_f64();
    let peak_mib = running.service.peak_mib()?;
    running.stop().await?;
    place.remove(&servers, &names).await?;
    println!("{}", head(&format!("ms, {} waiting", args.waiting)));
    println!("{}", claims.row("longest claim of a pass", 2));
    println!("{}", passes.row(&format!("claims of all {}", args.due), 2));
    println!("waiting rows that the claims touched: {touched}");
    println!("the healthy subscription, messages per second: {per_second:.0}");
    println!("peak memory of the service: {peak_mib:.0} MiB");
    if options.json {
        let all = json!({
            "mode": "waiting",
            "claim_ms": claims.json(),
            "pass_ms": passes.json(),
            "touched": touched,
            "handfast_per_s": per_second,
            "peak_memory_mib": peak_mib,
            "waiting": args.waiting,
            "due": args.due,
            "messages": messages,
            "payload_bytes": options.payload,
            "about": about,
        });
        println!("{all}");
    }
    Ok(())
}
