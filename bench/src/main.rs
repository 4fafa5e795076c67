//! What Handfast costs over the servers it runs on, and whether it stays there.
//!
//! In reading order: `servers` (what it runs on) · `place` (the databases and names of one run) ·
//! `topology` · `bare` (the same work without a service) · `bare_latency` (the same at a fixed rate) · `service` (the service as its own
//! process) · `handfast` (with the SDKs) · `sides` (who is measured when) · `rounds` (the median)
//! · `open_loop` (calls at their times) · `usage` (CPU, WAL, memory) · `fill` (what is
//! stored before) · a file per mode.

mod bare;
mod bare_latency;
mod drain;
mod embedded;
mod fanout;
mod fill;
mod front;
mod handfast;
mod idle;
mod latency;
mod open_loop;
mod options;
mod payload;
mod pipeline;
mod place;
mod pure;
mod rabbitmq_alone;
mod rounds;
mod sdk_path;
mod servers;
mod service;
mod sides;
mod stored;
mod topology;
mod unary;
mod usage;
mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;

/// Called wrongly; 1 is left for what was called rightly and failed.
const USAGE: u8 = 2;
/// As a shell says it of what Ctrl-C has ended.
const INTERRUPTED: u8 = 130;

/// Load and comparison. Rounds alternate, the first is dropped, the median counts.
#[derive(Debug, clap::Parser)]
#[command(
    name = "bench",
    after_help = "Examples:\n  cargo run --release -p bench -- pipeline\n  \
        cargo run --release -p bench -- latency --rate 1000 --json"
)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, clap::Subcommand)]
enum Mode {
    /// The bare pipeline beside Handfast: messages per second, and their ratio
    Pipeline(pipeline::Args),
    /// Prepare and confirm as single calls, beside the bare pipeline
    Unary(unary::Args),
    /// Messages per second with 1, 2, 4 and 8 subscriptions
    Fanout(fanout::Args),
    /// Messages per second with payloads of 100 B to 256 KiB
    Payload(payload::Args),
    /// Business transactions alone, and with their messages delivered and applied
    #[command(name = "sdk-path")]
    SdkPath(sdk_path::Args),
    /// An empty store beside one with millions of finished messages
    Stored(stored::Args),
    /// A healthy subscription beside one for which very much waits
    Waiting(waiting::Args),
    /// RabbitMQ gone for a while under a load that goes on
    Drain(drain::Args),
    /// What the service costs while nothing happens
    Idle(idle::Args),
    /// The embedded engines: messages per second
    Embedded(embedded::Args),
    /// The pure code that every message passes: nanoseconds per call
    Pure(pure::Args),
    /// From the scheduled time of a confirm to the handler, at a fixed rate
    Latency(latency::Args),
    /// The message service of a run
    #[command(name = service::SUBCOMMAND, hide = true)]
    Service {
        /// Its configuration
        config: PathBuf,
    },
}

/// Why a run failed: one line with what was attempted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failure(String);

impl Failure {
    /// What was attempted, for the error of it.
    fn of<E: std::fmt::Display>(doing: &str) -> impl Fn(E) -> Self {
        move |error| Self(format!("cannot {doing}: {error}"))
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_run(&error),
    };
    let done = match cli.mode {
        Mode::Pipeline(args) => on_a_runtime(pipeline::run(args)),
        Mode::Unary(args) => on_a_runtime(unary::run(args)),
        Mode::Fanout(args) => on_a_runtime(fanout::run(args)),
        Mode::Payload(args) => on_a_runtime(payload::run(args)),
        Mode::SdkPath(args) => on_a_runtime(sdk_path::run(args)),
        Mode::Stored(args) => on_a_runtime(stored::run(args)),
        Mode::Waiting(args) => on_a_runtime(waiting::run(args)),
        Mode::Drain(args) => on_a_runtime(drain::run(args)),
        Mode::Idle(args) => on_a_runtime(idle::run(args)),
        Mode::Embedded(args) => on_a_runtime(embedded::run(args)),
        Mode::Pure(args) => on_a_runtime(async move { pure::run(&args) }),
        Mode::Latency(args) => on_a_runtime(latency::run(args)),
        Mode::Service { config } => on_a_runtime(service::serve(config)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(None) => {
            eprintln!("interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(Some(Failure(line))) => {
            eprintln!("error: {line}");
            ExitCode::FAILURE
        }
    }
}

/// Help is no error; everything else is one line.
fn not_run(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        print!("{error}");
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    eprintln!("error: {line}; try --help");
    ExitCode::from(USAGE)
}

/// Runs it to its end, or until Ctrl-C, which drops it with all that it started.
fn on_a_runtime(run: impl Future<Output = Result<(), Failure>>) -> Result<(), Option<Failure>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Some(Failure(format!("cannot start the runtime: {error}"))))?;
    runtime.block_on(async {
        tokio::select! {
            done = run => return done.map_err(Some),
            _ = tokio::signal::ctrl_c() => {}
        }
        // What it had started is gone; what it had made on servers that stay goes now, unless
        // somebody is in a hurry.
        tokio::select! {
            () = place::remove_open() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        Err(None)
    })
}
