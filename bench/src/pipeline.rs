//! The bare pipeline beside Handfast.

use serde_json::json;

use crate::Failure;
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::usage::Usage;
use crate::{bare, handfast, topology};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cargo run --release -p bench -- pipeline --messages 200000 --json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages of one round; on a machine of two processors the default takes about 20 s
    #[arg(long, value_name = "N", default_value_t = 200_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Subscriptions that each get every message
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=16))]
    subscriptions: u32,

    /// Producers' calls in flight
    #[arg(long, value_name = "N", default_value_t = 2_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    in_flight: u64,
}

/// What one run gave.
struct Run {
    per_second: f64,
    used: serde_json::Value,
    peak_mib: Option<f64>,
}

/// Measures both in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let load_average = options.load_average()?;
    let servers = Servers::start(options).await?;
    let described = servers.described().await?;
    println!("load average at the start: {load_average}; {described}");
    let (mut bare, mut handfast, mut ratio) =
        (Figures::default(), Figures::default(), Figures::default());
    let mut peak: f64 = 0.0;
    let mut rounds = Vec::new();
    for round in 0..=options.rounds {
        eprintln!("round {round}: the bare pipeline, then handfast");
        let one = run_bare(&servers, &args).await?;
        let other = run_handfast(&servers, &args).await?;
        let dropped = if round == 0 { ", dropped" } else { "" };
        eprintln!(
            "round {round}{dropped}: bare {:.0}/s, handfast {:.0}/s, ratio {:.3}",
            one.per_second,
            other.per_second,
            other.per_second / one.per_second
        );
        if round == 0 {
            continue;
        }
        bare.add(one.per_second);
        handfast.add(other.per_second);
        ratio.add(other.per_second / one.per_second);
        peak = peak.max(other.peak_mib.unwrap_or_default());
        rounds.push(json!({ "bare": one.used, "handfast": other.used }));
    }
    println!("{}", head("messages per second"));
    println!("{}", bare.row("bare pipeline", 0));
    println!("{}", handfast.row("handfast", 0));
    println!("{}", ratio.row("ratio", 3));
    println!("peak memory of the service: {peak:.0} MiB");
    if options.json {
        let all = json!({
            "mode": "pipeline",
            "ratio_median": ratio.median(),
            "ratio": ratio.json(),
            "bare_per_s": bare.json(),
            "handfast_per_s": handfast.json(),
            "peak_memory_mib": peak,
            "used": rounds,
            "messages": args.messages,
            "payload_bytes": options.payload,
            "subscriptions": args.subscriptions,
            "in_flight": args.in_flight,
            "load_average": load_average,
            "servers": described,
        });
        println!("{all}");
    }
    Ok(())
}

async fn run_bare(servers: &Servers, args: &Args) -> Result<Run, Failure> {
    let names = topology::subscriptions(args.subscriptions);
    let place = Place::make(servers).await?;
    let before = Usage::now(servers).await?;
    let payload = args.options.payload as usize;
    let took = bare::run(&place, &names, args.messages, payload).await?;
    let used = Usage::now(servers).await?.since(before, args.messages);
    place.remove(servers, &names).await?;
    Ok(Run {
        per_second: args.messages as f64 / took.as_secs_f64(),
        used,
        peak_mib: None,
    })
}

async fn run_handfast(servers: &Servers, args: &Args) -> Result<Run, Failure> {
    let names = topology::subscriptions(args.subscriptions);
    let place = Place::make(servers).await?;
    let mut running = handfast::Running::start(&place, &names, |_: &[u8]| {}).await?;
    let before = Usage::now(servers).await?;
    let took = handfast::load(
        &mut running,
        u64::from(args.subscriptions),
        args.messages,
        args.options.payload as usize,
        args.in_flight,
    )
    .await?;
    let used = Usage::now(servers).await?.since(before, args.messages);
    let peak_mib = Some(running.peak_mib()?);
    running.stop().await?;
    place.remove(servers, &names).await?;
    Ok(Run {
        per_second: args.messages as f64 / took.as_secs_f64(),
        used,
        peak_mib,
    })
}
