//! `handfast demo`, and the hidden subcommand that its four processes run.

use std::path::PathBuf;
use std::process::ExitCode;

use handfast_service::config::LogFormat;
use handfast_service::telemetry;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Failure, fail, serve};
use crate::demo;

/// Pay, kill every process, and show that everything adds up.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 it adds up, 1 it does not or could not be carried through, 2 it \
        was called wrongly, 130 it was ended by Ctrl-C (143 by SIGTERM, 129 by SIGHUP). However \
        it ends, its processes end with it, and its files are removed unless --keep was given.\n\n\
        Examples:\n  \
        handfast demo\n  \
        handfast demo --payments 5000 --seed 7 --keep /tmp/handfast-demo\n  \
        handfast demo --json | tail -n 1"
)]
pub(super) struct Args {
    /// How many orders are to be paid
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1_000,
        value_parser = clap::value_parser!(u64).range(1..=demo::MAX_PAYMENTS)
    )]
    payments: u64,

    /// The same seed makes the same plan [default: drawn, and shown]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// Where the service keeps messages: sqlite (postgres://… not yet)
    #[arg(long, value_name = "STORE", default_value = "sqlite", value_parser = store)]
    store: Engine,

    /// What carries deliveries: embedded (amqp://… not yet)
    #[arg(long, value_name = "BROKER", default_value = "embedded", value_parser = broker)]
    broker: Engine,

    /// Keep databases and logs in this folder, which must not hold those of a former run
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// Print the result as one JSON object, the last line of standard output
    #[arg(long)]
    json: bool,
}

/// Which store or broker was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Embedded,
    /// Understood, and not there yet; the scheme of its URL.
    Later(&'static str),
}

fn store(text: &str) -> Result<Engine, String> {
    engine(text, "sqlite", &["postgres", "postgresql"])
}

fn broker(text: &str) -> Result<Engine, String> {
    engine(text, "embedded", &["amqp", "amqps"])
}

fn engine(text: &str, embedded: &str, later: &[&'static str]) -> Result<Engine, String> {
    if text == embedded {
        return Ok(Engine::Embedded);
    }
    let scheme = text.split_once("://").map(|(scheme, _)| scheme);
    later
        .iter()
        .find(|known| scheme == Some(known))
        .map(|known| Engine::Later(known))
        .ok_or_else(|| format!("use {embedded}"))
}

/// Runs the demo and says with the exit code how it ended.
pub(super) fn run(args: Args) -> ExitCode {
    match carry_out(args) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => {
            let code = u8::try_from(128 + signal.as_raw_value()).unwrap_or(1);
            fail(code, "the demo was ended by a signal; nothing can be said")
        }
        Err(Failure(line)) => fail(1, &line),
    }
}

fn carry_out(args: Args) -> Result<Option<SignalKind>, Failure> {
    for (engine, flag, embedded) in [
        (args.store, "--store", "sqlite"),
        (args.broker, "--broker", "embedded"),
    ] {
        if let Engine::Later(scheme) = engine {
            return Err(Failure(format!(
                "cannot run the demo with {flag} {scheme}://…: not yet; use {flag} {embedded}"
            )));
        }
    }
    let options = demo::Options {
        payments: args.payments,
        seed: args.seed,
        keep: args.keep,
        json: args.json,
    };
    runtime()?.block_on(async {
        let interrupted = interruption()
            .map_err(|error| Failure(format!("cannot listen for signals: {error}")))?;
        Ok(demo::run(options, interrupted).await?)
    })
}

/// From here on none of the signals that ask for an end ends the process by itself.
fn interruption() -> std::io::Result<impl Future<Output = SignalKind>> {
    let (mut interrupt, mut terminate, mut hangup) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
    );
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
            _ = hangup.recv() => SignalKind::hangup(),
        }
    })
}

/// One process of the demo. It ends when its standard input is closed.
#[derive(Debug, clap::Args)]
pub(super) struct Party {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, clap::Subcommand)]
enum Role {
    /// The message service
    Service(Box<serve::Args>),
    /// The producer
    Payment(payment::Options),
    /// The consumer that writes vouchers
    Accounting(accounting::Options),
    /// The consumer that grants points
    Points(points::Options),
}

impl Party {
    /// Runs the process until it is stopped, killed, or left alone.
    pub(super) fn run(self) -> Result<(), Failure> {
        demo::watch_parent()
            .map_err(|error| Failure(format!("cannot watch the parent: {error}")))?;
        if let Role::Service(args) = self.role {
            return serve::run(*args);
        }
        telemetry::install("info", LogFormat::Text)?;
        runtime()?.block_on(async {
            let mut terminate = signal(SignalKind::terminate())
                .map_err(|error| Failure(format!("cannot listen for signals: {error}")))?;
            let stop = CancellationToken::new();
            let asked = stop.clone();
            tokio::spawn(async move {
                terminate.recv().await;
                asked.cancel();
            });
            match self.role {
                Role::Service(_) => Ok(()),
                Role::Payment(options) => Ok(payment::run(options, stop).await?),
                Role::Accounting(options) => Ok(accounting::run(options, stop).await?),
                Role::Points(options) => Ok(points::run(options, stop).await?),
            }
        })
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("cannot start the runtime: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_there_not_there_yet_or_unknown() {
        assert_eq!(store("sqlite"), Ok(Engine::Embedded));
        assert_eq!(store("postgres://u:p@h/d"), Ok(Engine::Later("postgres")));
        assert_eq!(broker("amqps://h"), Ok(Engine::Later("amqps")));
        assert!(broker("sqlite").is_err());
        assert!(!store("mysql://u:secret@h").unwrap_err().contains("secret"));
    }
}
