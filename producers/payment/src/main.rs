//! The process of the reference service payment.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use payment::{Options, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Pays orders from balances, and tells whoever wants to know.
#[derive(Parser)]
#[command(name = "payment", version)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { options } = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_env_filter(filter)
        // Colours are for eyes; in a file they hide words from a search.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match start(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("payment: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn start(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    handfast_fail_points::arm_from_environment()?;
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let wait = async |terminate: &mut tokio::signal::unix::Signal,
                          interrupt: &mut tokio::signal::unix::Signal| {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        wait(&mut terminate, &mut interrupt).await;
        tracing::info!("stopping; a second signal ends at once");
        stop.cancel();
        wait(&mut terminate, &mut interrupt).await;
        std::process::exit(1);
    });
    run(options, shutdown).await?;
    Ok(())
}
