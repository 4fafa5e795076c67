//! Messages per second by the size of their payload.

use serde_json::json;

use crate::Failure;
use crate::options::Options;
use crate::pipeline::run_handfast;
use crate::servers::Servers;
use crate::sides::{Run, alternate};
use crate::topology::subscriptions;

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- payload --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages of one side and round, or fewer where they come to more than --megabytes
    #[arg(long, value_name = "N", default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Payload of one side and round at most
    #[arg(long, value_name = "N", default_value_t = 500,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    megabytes: u64,

    /// Producers' calls in flight
    #[arg(long, value_name = "N", default_value_t = 500,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    in_flight: u64,
}

const SIDES: [(&str, u64); 6] = [
    ("bytes_1024", 1_024),
    ("bytes_100", 100),
    ("bytes_4096", 4_096),
    ("bytes_16384", 16_384),
    ("bytes_65536", 65_536),
    ("bytes_262144", 262_144),
];

/// Measures all in turn. `--payload` says nothing here.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    let one = subscriptions(1);
    let names = SIDES.map(|(name, _)| name);
    let sides = alternate(options, &names, async |side| -> Result<Run, Failure> {
        let bytes = SIDES[side].1;
        let messages = args
            .messages
            .min((args.megabytes * 1_000_000 / bytes).max(1));
        let payload = usize::try_from(bytes).unwrap_or(usize::MAX);
        run_handfast(&servers, &one, messages, payload, args.in_flight).await
    });
    let sides = sides.await?;
    sides.print();
    if options.json {
        let others = json!({
            "messages": args.messages,
            "megabytes": args.megabytes,
            "in_flight": args.in_flight,
            "about": about,
        });
        println!("{}", sides.json("payload", others));
    }
    Ok(())
}
