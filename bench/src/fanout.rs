//! Messages per second with one subscription, and with more; beside it what a second one costs the
//! bare pipeline.

use serde_json::json;

use crate::Failure;
use crate::options::Options;
use crate::pipeline::{run_bare, run_handfast};
use crate::servers::Servers;
use crate::sides::alternate;
use crate::topology::subscriptions;

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- fanout --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages of one side and round
    #[arg(long, value_name = "N", default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Producers' calls in flight
    #[arg(long, value_name = "N", default_value_t = 2_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    in_flight: u64,
}

const SIDES: [(&str, u32); 4] = [("one", 1), ("two", 2), ("four", 4), ("eight", 8)];
const BARE: [(&str, u32); 2] = [("bare_one", 1), ("bare_two", 2)];

/// Measures all in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    let payload = options.payload as usize;
    let names: Vec<_> = SIDES.iter().chain(&BARE).map(|(name, _)| *name).collect();
    let sides = alternate(options, &names, async |side| {
        let bare = side.checked_sub(SIDES.len());
        let count = bare.map_or_else(|| SIDES[side].1, |bare| BARE[bare].1);
        let (names, messages) = (subscriptions(count), args.messages);
        match bare {
            None => run_handfast(&servers, &names, messages, payload, args.in_flight).await,
            Some(_) => run_bare(&servers, &names, messages, payload).await,
        }
    });
    let sides = sides.await?;
    sides.print();
    let [one, two] = [4, 5].map(|side| sides.per_second(side));
    println!("bare pipeline, two to one: {:.3}", two / one);
    if options.json {
        let others = json!({
            "bare_ratio": two / one,
            "messages": args.messages,
            "payload_bytes": options.payload,
            "in_flight": args.in_flight,
            "about": about,
        });
        println!("{}", sides.json("fanout", others));
    }
    Ok(())
}
