//! Logs: one line per event on standard error, for people or as JSON.
//!
//! Standard output belongs to what a command was asked for, so no log line ever goes there.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::config::LogFormat;

/// What is not logged unless it is asked for: lapin reports every end of a connection as an error,
/// ours too, and the links say the same once.
const NOISE: &str = "lapin=off";
/// True for what is never logged, whatever is asked for: lapin prints a message that RabbitMQ
/// returned with its payload, and to trace every frame, the password among them.
fn is_secret(event: &Metadata<'_>) -> bool {
    let target = event.target();
    target.starts_with("lapin::returned_messages")
        || (target.starts_with("lapin") && *event.level() == Level::TRACE)
}

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is not one. A checked configuration never has such a filter.
    #[error("cannot log with the filter `{filter}`: {source}; use for example info")]
    Filter {
        /// What was given.
        filter: String,
        /// Where it is wrong.
        source: tracing_subscriber::filter::ParseError,
    },
    /// This process logs already.
    #[error("cannot begin to log: {0}; it can be done once per process")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Begins to log to standard error, for the whole process and until its end.
pub fn install(filter: &str, format: LogFormat) -> Result<(), Error> {
    let parsed = EnvFilter::builder()
        .parse(format!("{NOISE},{filter}"))
        .map_err(|source| Error::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let filter = parsed.and(filter_fn(|event| !is_secret(event)));
    let lines = fmt::layer()
        // If nobody reads the log any more, that must not be written about to the same place:
        // the attempt would panic in whatever task had something to say.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let lines = match format {
        // Colours are for eyes; in a file or a pipe they hide words from a search.
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    registry().with(lines.with_filter(filter)).try_init()?;
    Ok(())
}
