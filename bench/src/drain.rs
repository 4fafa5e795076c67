//! RabbitMQ gone for a while under a load that goes on: what is accepted meanwhile, and how soon all
//! of it is delivered afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use handfast_consumer::Delivered;
use serde_json::json;
use tokio::time::sleep_until;
use uuid::Uuid;

use crate::fill::{self, Kind};
use crate::handfast::{Plan, Running};
use crate::latency::{NONE, at, message, micros, note, number};
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::{Failure, open_loop, topology};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cargo run --release -p bench -- drain --rounds 1 --gone 60 --json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages per second, all the time
    #[arg(long, value_name = "N", default_value_t = 2_000,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,

    /// Seconds without RabbitMQ, beside the time that it takes to start
    #[arg(long, value_name = "N", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=3_600))]
    gone: u64,

    /// Seconds of load after that
    #[arg(long, value_name = "N", default_value_t = 90,
        value_parser = clap::value_parser!(u64).range(1..=3_600))]
    after: u64,

    /// Finished messages that are there before
    #[arg(long, value_name = "N", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(0..=1_000_000_000))]
    stored: u64,
}

/// A prepare is scheduled this much before its confirm.
const AHEAD: Duration = Duration::from_millis(100);
/// Seconds of load before RabbitMQ goes.
const BEFORE: u64 = 5;

/// Measures round by round; none is dropped.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    if options.broker.is_some() {
        let line = "drain ends RabbitMQ, and a named one is not its own to end; leave --broker out";
        return Err(Failure(line.to_owned()));
    }
    let (mut servers, about) = Servers::start(options).await?;
    fill::check_space(servers.postgres_folder(), args.stored)?;
    let mut rows = [
        "accepted meanwhile, share",
        "gone for, s",
        "waiting at its return",
        "all delivered after, s",
        "new ones meanwhile, p99 s",
    ]
    .map(|name| (name, Figures::default()));
    for round in 1..=options.rounds {
        eprintln!("round {round}");
        let figures = one(&mut servers, &args).await?;
        for ((name, row), figure) in rows.iter_mut().zip(figures) {
            eprintln!("round {round}: {name}: {figure:.3}");
            row.add(figure);
        }
    }
    println!("{}", head(&format!("at {}/s", args.rate)));
    for (name, row) in &rows {
        println!("{}", row.row(name, 3));
    }
    if options.json {
        let [accepted, gone, waiting, drained, new] = rows.map(|(_, row)| row.json());
        let all = json!({
            "mode": "drain",
            "accepted": accepted,
            "gone_s": gone,
            "waiting": waiting,
            "drained_s": drained,
            "new_p99_s": new,
            "rate": args.rate,
            "stored": args.stored,
            "payload_bytes": options.payload,
            "about": about,
        });
        println!("{all}");
    }
    Ok(())
}

async fn one(servers: &mut Servers, args: &Args) -> Result<[f64; 5], Failure> {
    let names = topology::subscriptions(1);
    let place = Place::make(servers).await?;
    let payload = args.options.payload as usize;
    fill::schema(&place, &names).await?;
    fill::load(&place, &names[0], Kind::Finished, args.stored, payload).await?;
    let count = u64::from(args.rate) * (BEFORE + args.gone + args.after);
    let times = || Arc::new((0..count).map(|_| AtomicU64::new(NONE)).collect::<Vec<_>>());
    let (accepted, handled) = (times(), times());
    let zero = Instant::now();
    let seen = {
        let handled = handled.clone();
        move |delivered: &Delivered| {
            if let Some(index) = number(&delivered.payload) {
                note(&handled, index, micros(zero.elapsed()));
            }
        }
    };
    let plan = Plan {
        consumed: names.clone(),
        large_batches: true,
        ..Plan::default()
    };
    let mut running = Running::start(&place, plan, seen).await?;
    let (first, rate) = (zero.elapsed() + Duration::from_millis(500), args.rate);
    let due = move |number: u64| first + Duration::from_secs(number) / rate;
    let calls = {
        let (producer, accepted) = (running.producer.clone(), accepted.clone());
        open_loop::run(zero, count, due, AHEAD, move |number, go| {
            let (producer, accepted) = (producer.clone(), accepted.clone());
            let message = message(number, payload);
            async move {
                let id = Uuid::now_v7();
                // What is refused is counted, not repeated.
                let prepared = producer.prepare(id, &message, None).await;
                go.await.map_err(Failure::of("wait for a confirm's time"))?;
                if prepared.is_ok() && producer.confirm(id).await.is_ok() {
                    note(&accepted, number as usize, micros(zero.elapsed()));
                }
                Ok(())
            }
        })
    };
    let outage = async {
        let from = first + Duration::from_secs(BEFORE);
        sleep_until((zero + from).into()).await;
        servers
            .rabbitmq_gone(Duration::from_secs(args.gone))
            .await?;
        Ok::<_, Failure>((from, zero.elapsed()))
    };
    let (called, outage) = tokio::join!(calls, outage);
    called?;
    let (from, until) = outage?;
    let is_there =
        |times: &[AtomicU64], number: usize| times[number].load(Ordering::SeqCst) != NONE;
    let all_accepted = (0..handled.len())
        .filter(|number| is_there(&accepted, *number))
        .count();
    // The first message of the start counts, too.
    running.all_applied(all_accepted as u64 + 1).await?;
    running.stop().await?;
    place.remove(servers, &names).await?;
    let of = |from: Duration, until: Duration| {
        (0..handled.len()).filter(move |number| (from..until).contains(&due(*number as u64)))
    };
    let scheduled = of(from, until).count();
    let taken = of(from, until)
        .filter(|number| is_there(&accepted, *number))
        .count();
    let time = |number: usize| match handled[number].load(Ordering::SeqCst) {
        NONE => None,
        time => Some(Duration::from_micros(time)),
    };
    let last = of(from, until).filter_map(time).max().unwrap_or_default();
    let waiting = of(from, until)
        .filter_map(time)
        .filter(|time| *time > until)
        .count();
    let mut new: Vec<f64> = of(until, last)
        .filter_map(|number| {
            Some(
                time(number)?
                    .saturating_sub(due(number as u64))
                    .as_secs_f64(),
            )
        })
        .collect();
    Ok([
        taken as f64 / scheduled.max(1) as f64,
        (until - from).as_secs_f64(),
        waiting as f64,
        last.saturating_sub(until).as_secs_f64(),
        at(&mut new, 0.99),
    ])
}
