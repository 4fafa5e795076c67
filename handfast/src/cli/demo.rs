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
        handfast demo --json | tail -n 1\n  \
        handfast demo --store postgres://postgres@127.0.0.1/postgres \\\n    \
        --broker amqp://guest:guest@127.0.0.1:5672/%2f"
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

    /// Where messages are kept: sqlite, or the URL of a PostgreSQL server, on which the demo makes
    /// databases of its own and removes them at the end
    #[arg(long, value_name = "URL", default_value = "sqlite")]
    store: String,

    /// What carries deliveries: embedded, or with a postgres:// store an amqp:// URL; names of its
    /// own are removed at the end
    #[arg(long, value_name = "URL", default_value = "embedded")]
    broker: String,

    /// Keep databases and logs in this folder, which must not hold those of a former run
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// Print the result as one JSON object, the last line of standard output
    #[arg(long)]
    json: bool,
}

/// The pair of engines that was asked for. The error repeats no URL, which may carry a password.
fn engines(store: &str, broker: &str) -> Result<demo::Wanted, String> {
    let starts = |text: &str, schemes: &[&str]| schemes.iter().any(|s| text.starts_with(s));
    let on_postgres = match store {
        "sqlite" => false,
        url if starts(url, &["postgres://", "postgresql://"]) => true,
        _ => return Err("--store: use sqlite or postgres://…".to_owned()),
    };
    let on_rabbitmq = match broker {
        "embedded" => false,
        url if starts(url, &["amqp://", "amqps://"]) => true,
        _ => return Err("--broker: use embedded or amqp://…".to_owned()),
    };
    match (on_postgres, on_rabbitmq) {
        (false, false) => Ok(demo::Wanted::Embedded),
        (true, true) => demo::Wanted::production(store, broker),
        (true, false) | (false, true) => Err(
            "--store and --broker do not go together; use sqlite with embedded, or postgres://… \
             with amqp://…"
                .to_owned(),
        ),
    }
}

/// Runs the demo and says with the exit code how it ended.
pub(super) fn run(args: Args) -> ExitCode {
    let wanted = match engines(&args.store, &args.broker) {
        Ok(wanted) => wanted,
        Err(why) => return fail(2, &why),
    };
    match carry_out(args, wanted) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => {
            let code = u8::try_from(128 + signal.as_raw_value()).unwrap_or(1);
            fail(code, "the demo was ended by a signal; nothing can be said")
        }
        Err(Failure(line)) => fail(1, &line),
    }
}

fn carry_out(args: Args, wanted: demo::Wanted) -> Result<Option<SignalKind>, Failure> {
    let options = demo::Options {
        payments: args.payments,
        seed: args.seed,
        wanted,
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
    fn only_the_two_pairs_are_taken() {
        let wrong = |store, broker| engines(store, broker).err().unwrap();
        assert!(engines("sqlite", "embedded").is_ok());
        assert!(engines("postgres://u:p@h/d", "amqp://h").is_ok());
        for (store, broker) in [
            ("mysql://u:secret@h", "embedded"),
            ("sqlite", "kafka://u:secret@h"),
            ("sqlite", "amqp://u:secret@h"),
            ("postgres://u:secret@h/d", "embedded"),
            ("postgres://u:secret@h/d", "amqps://u:secret@h"),
        ] {
            let why = wrong(store, broker);
            assert!(!why.contains("secret") && why.lines().count() == 1, "{why}");
        }
    }
}
