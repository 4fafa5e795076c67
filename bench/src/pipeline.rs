//! The bare pipeline beside Handfast.

use serde_json::json;

use crate::handfast::{Plan, Running};
use crate::options::Options;
use crate::place::Place;
use crate::servers::Servers;
use crate::sides::{Run, alternate};
use crate::usage::Usage;
use crate::{Failure, bare, handfast, topology};

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

/// Measures both in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    let payload = options.payload as usize;
    let names = topology::subscriptions(args.subscriptions);
    let sides = alternate(options, &["bare", "handfast"], async |side| match side {
        0 => run_bare(&servers, &names, args.messages, payload).await,
        _ => run_handfast(&servers, &names, args.messages, payload, args.in_flight).await,
    });
    let sides = sides.await?;
    sides.print();
    if options.json {
        let others = json!({
            "messages": args.messages,
            "payload_bytes": options.payload,
            "subscriptions": args.subscriptions,
            "in_flight": args.in_flight,
            "about": about,
        });
        println!("{}", sides.json("pipeline", others));
    }
    Ok(())
}

/// One run of the bare pipeline.
pub(crate) async fn run_bare(
    servers: &Servers,
    names: &[String],
    messages: u64,
    payload: usize,
) -> Result<Run, Failure> {
    let place = Place::make(servers).await?;
    let before = Usage::now(servers).await?;
    let took = bare::run(&place, names, messages, payload).await?;
    let used = before.until_now(servers, messages).await?;
    place.remove(servers, names).await?;
    Ok(Run {
        per_second: messages as f64 / took.as_secs_f64(),
        used,
        peak_mib: 0.0,
    })
}

/// One run of Handfast.
pub(crate) async fn run_handfast(
    servers: &Servers,
    names: &[String],
    messages: u64,
    payload: usize,
    in_flight: u64,
) -> Result<Run, Failure> {
    measured(servers, names, messages, async |running| {
        handfast::call(&running.producer, messages, payload, in_flight).await
    })
    .await
}

/// One run of Handfast, with calls of its own kind.
pub(crate) async fn measured(
    servers: &Servers,
    names: &[String],
    messages: u64,
    call: impl AsyncFnOnce(&Running) -> Result<(), Failure>,
) -> Result<Run, Failure> {
    let place = Place::make(servers).await?;
    let run = measured_at(servers, &place, names, messages, call).await?;
    place.remove(servers, names).await?;
    Ok(run)
}

/// The same at a place that stays.
pub(crate) async fn measured_at(
    servers: &Servers,
    place: &Place,
    names: &[String],
    messages: u64,
    call: impl AsyncFnOnce(&Running) -> Result<(), Failure>,
) -> Result<Run, Failure> {
    let plan = Plan {
        consumed: names.to_vec(),
        large_batches: true,
        ..Plan::default()
    };
    let mut running = Running::start(place, plan, |_| {}).await?;
    let before = Usage::now(servers).await?;
    let took = running.load(messages, call).await?;
    let used = before.until_now(servers, messages).await?;
    let peak_mib = running.service.peak_mib()?;
    running.stop().await?;
    Ok(Run {
        per_second: messages as f64 / took.as_secs_f64(),
        used,
        peak_mib,
    })
}
