//! What the service costs while nothing happens.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::fill::{self, Kind};
use crate::handfast::{Plan, Running};
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::{Failure, topology};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- idle --rounds 3 --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Finished messages that are there
    #[arg(long, value_name = "N", default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u64).range(0..=1_000_000_000))]
    stored: u64,

    /// Seconds from the last message to the first round
    #[arg(long, value_name = "N", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(0..=3_600))]
    settle: u64,

    /// Length of one round
    #[arg(long, value_name = "N", default_value_t = 20,
        value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
}

/// Measures round by round.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    fill::check_space(servers.postgres_folder(), args.stored)?;
    let names = topology::subscriptions(1);
    let place = Place::make(&servers).await?;
    fill::schema(&place, &names).await?;
    let payload = options.payload as usize;
    fill::load(&place, &names[0], Kind::Finished, args.stored, payload).await?;
    let plan = Plan {
        consumed: names.clone(),
        ..Plan::default()
    };
    let running = Running::start(&place, plan, |_| {}).await?;
    eprintln!("waiting for {} s", args.settle);
    tokio::time::sleep(Duration::from_secs(args.settle)).await;
    let (mut cores, mut statements) = (Figures::default(), Figures::default());
    let mut before = now(&servers, &place, &running).await?;
    for round in 0..=options.rounds {
        tokio::time::sleep(Duration::from_secs(args.seconds)).await;
        let after = now(&servers, &place, &running).await?;
        let seconds = (after.at - before.at).as_secs_f64();
        let share = 100.0 * (after.cpu_s - before.cpu_s) / seconds;
        let rate = (after.transactions - before.transactions) as f64 / seconds;
        eprintln!("round {round}: {share:.2} % of a core, {rate:.1} statements/s");
        if round > 0 {
            cores.add(share);
            statements.add(rate);
        }
        before = after;
    }
    running.stop().await?;
    place.remove(&servers, &names).await?;
    println!("{}", head(&format!("idle, {} stored", args.stored)));
    println!("{}", cores.row("percent of a core", 2));
    println!("{}", statements.row("statements per second", 2));
    if options.json {
        let all = json!({
            "mode": "idle",
            "core_percent": cores.json(),
            "statements_per_s": statements.json(),
            "stored": args.stored,
            "settle_s": args.settle,
            "seconds": args.seconds,
            "about": about,
        });
        println!("{all}");
    }
    Ok(())
}

struct Moment {
    at: Instant,
    cpu_s: f64,
    /// Each statement of the service is a transaction of its own.
    transactions: i64,
}

async fn now(servers: &Servers, place: &Place, running: &Running) -> Result<Moment, Failure> {
    let mut db = servers.admin().await?;
    let transactions: i64 = sqlx::query_scalar(
        "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1",
    )
    .bind(place.store_database())
    .fetch_one(&mut db)
    .await
    .map_err(Failure::of("count transactions"))?;
    Ok(Moment {
        at: Instant::now(),
        cpu_s: running.service.cpu_s()?,
        transactions,
    })
}
