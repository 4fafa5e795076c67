//! `handfast serve`: the configuration from its three sources, the signals, the service.

use std::path::PathBuf;

use handfast_service::config::{Config, DEFAULT_FILE, Settings};
use handfast_service::{serve, telemetry};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Failure;

/// Run the message service.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A flag wins over its environment variable, the variable over the file, the \
        file over the default.\n\n\
        SIGTERM or Ctrl-C: calls in flight are finished, then the exit code is 0. A second one \
        ends the process at once with 143 or 130.\n\n\
        Examples:\n  \
        handfast serve --config handfast.toml\n  \
        handfast serve --listen 127.0.0.1:7400 --store sqlite:/var/lib/handfast/handfast.db\n  \
        handfast serve --store postgres://handfast@db/handfast --broker amqp://handfast@mq/%2f"
)]
pub(super) struct Args {
    /// The configuration file
    #[arg(long, env = "HANDFAST_CONFIG", value_name = "FILE", default_value = DEFAULT_FILE)]
    config: PathBuf,

    #[command(
        flatten,
        next_help_heading = "Instead of what the file says in [server]"
    )]
    settings: Settings,
}

/// Serves until a signal.
pub(super) fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(&args.config, args.settings)?;
    telemetry::install(&config.server.log, config.server.log_format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(async {
        let signals = Signals::listen()
            .map_err(|error| Failure(format!("cannot listen for signals: {error}")))?;
        let stop = CancellationToken::new();
        tokio::spawn(signals.run(stop.clone()));
        Ok(serve::serve(config, stop).await?)
    })
}

/// The two signals that ask for an end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on, neither signal ends the process by itself.
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The first signal asks, the second one does not: what was acknowledged is durable, so
    /// nothing is lost by it.
    async fn run(mut self, stop: CancellationToken) {
        let first = self.next().await;
        tracing::info!(
            signal = first.as_raw_value(),
            "stopping; once more ends at once"
        );
        stop.cancel();
        let second = self.next().await;
        std::process::exit(128 + second.as_raw_value());
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }
}
