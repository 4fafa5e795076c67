//! The process around accounting: options, log, signals, exit codes.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use accounting::Options;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Writes a balanced voucher for every completed payment.
#[derive(Parser)]
#[command(name = "accounting", version)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

/// What is logged unless RUST_LOG says otherwise. lapin would print what RabbitMQ returns, and
/// every loss of a connection, of which the SDK tells once.
const LOG: &str = "info,lapin=off";

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG));
    tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_env_filter(filter)
        // Colours are for eyes; in a file they hide words from a search.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let result = async {
        handfast_fail_points::arm_from_environment()?;
        let shutdown =
            stop_on_signal().map_err(|error| format!("cannot catch signals: {error}"))?;
        accounting::run(cli.options, shutdown)
            .await
            .map_err(|error| error.to_string())
    };
    match result.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("accounting: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The first SIGTERM or Ctrl-C begins the shutdown, the second ends the process at once.
fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let told = shutdown.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if told.is_cancelled() {
                std::process::exit(1);
            }
            told.cancel();
        }
    });
    Ok(shutdown)
}
