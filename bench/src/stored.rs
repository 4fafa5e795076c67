//! An empty store beside one that holds millions of finished messages, and beside the same with a
//! snapshot held open, which keeps the database from clearing up what is dead.

use serde_json::json;
use sqlx::Executor as _;

use crate::fill::{self, Kind};
use crate::options::Options;
use crate::pipeline::measured_at;
use crate::place::Place;
use crate::servers::Servers;
use crate::sides::{Run, alternate};
use crate::{Failure, handfast, topology};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cargo run --release -p bench -- stored --stored 1000000 --json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Finished messages that are there before
    #[arg(long, value_name = "N", default_value_t = 10_000_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    stored: u64,

    /// Messages of one side and round; on a machine of two processors the default takes about 20 s
    #[arg(long, value_name = "N", default_value_t = 200_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Producers' calls in flight
    #[arg(long, value_name = "N", default_value_t = 2_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000))]
    in_flight: u64,
}

/// Measures all in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    fill::check_space(servers.postgres_folder(), args.stored)?;
    let names = topology::subscriptions(1);
    let payload = options.payload as usize;
    let full = Place::make(&servers).await?;
    fill::schema(&full, &names).await?;
    let began = std::time::Instant::now();
    fill::load(&full, &names[0], Kind::Finished, args.stored, payload).await?;
    let loaded_s = began.elapsed().as_secs_f64();
    println!("{} messages were loaded in {loaded_s:.0} s", args.stored);
    let sides = ["empty", "stored", "snapshot"];
    let sides = alternate(options, &sides, async |side| -> Result<Run, Failure> {
        if side == 0 {
            let place = Place::make(&servers).await?;
            let run = one(&servers, &place, &names, &args).await?;
            place.remove(&servers, &names).await?;
            return Ok(run);
        }
        let mut held = None;
        if side == 2 {
            let mut db = fill::connect(&full).await?;
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM topic")
                .await
                .map_err(Failure::of("hold a snapshot open"))?;
            held = Some(db);
        }
        let run = one(&servers, &full, &names, &args).await;
        drop(held);
        run
    });
    let sides = sides.await?;
    full.remove(&servers, &names).await?;
    sides.print();
    if options.json {
        let others = json!({
            "stored": args.stored,
            "loaded_s": loaded_s,
            "messages": args.messages,
            "payload_bytes": options.payload,
            "in_flight": args.in_flight,
            "about": about,
        });
        println!("{}", sides.json("stored", others));
    }
    Ok(())
}

async fn one(
    servers: &Servers,
    place: &Place,
    names: &[String],
    args: &Args,
) -> Result<Run, Failure> {
    let (messages, payload) = (args.messages, args.options.payload as usize);
    measured_at(servers, place, names, messages, async |running| {
        handfast::call(&running.producer, messages, payload, args.in_flight).await
    })
    .await
}
