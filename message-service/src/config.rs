//! The configuration: `handfast.toml`, the environment and the flags, checked as a whole.
//!
//! One list of keys ([`Settings`]) serves all three sources of server settings: a flag wins
//! over the environment, the environment over the file, the file over the default. Producers,
//! topics and subscriptions come from the file alone. Nothing is opened, bound or written
//! before the whole of it was found right, and the first thing that is wrong is named with its
//! line.

mod engines;
mod place;
mod server;
mod settings;
mod topology;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::topology::Topology;

pub use engines::{Engines, PostgresUrl, sqlite_file};
pub use server::{LogFormat, Server};
pub use settings::Settings;
pub use topology::MOST_PER_KIND;

use place::Source;
use topology::{ProducerTable, SubscriptionTable, TopicTable};

/// The file that is read when no other is named, in the working directory.
pub const DEFAULT_FILE: &str = "handfast.toml";

/// The largest configuration file that is read, in bytes.
pub const MOST_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// A configuration that was checked as a whole.
///
/// ```
/// use handfast_service::config::{Config, Settings};
///
/// let file = r#"
/// topology_version = 1                # goes up with every change below [server]
///
/// [server]
/// listen = "127.0.0.1:7400"
/// store = "sqlite:handfast.db"        # relative to the working directory
/// broker = "embedded"                 # or, with a postgres:// store, amqp://…
/// deployment = "handfast"             # what every name in RabbitMQ begins with
/// insecure_listen = false             # true allows an address that is not loopback
/// reflection = false                  # true: gRPC reflection on such an address too
/// shutdown_deadline_s = 25
/// payload_bytes = 262144              # at most 1048576
/// inflight_bytes = 33554432
/// max_undecided = 100000              # PREPARED messages of one producer
/// max_backlog_bytes = 17179869184     # of what is unfinished; beyond it, prepare and publish are refused
/// retention_s = 604800                # of finished messages
/// bucket_s = 86400                    # one table of bodies
/// publisher_confirm_ms = 10000        # below lease_ms
/// lease_ms = 30000                    # below resend_after_ms
/// resend_after_ms = 45000             # when silence is looked at
/// passed_by_ms = 30000                # how much later than a lost one an answered one was sent
/// start_grace_ms = 30000              # no resend so soon after a start
/// check_call_ms = 5000                # one call to a status endpoint
/// log = "info"                        # a filter such as "info,handfast_service=debug"
/// log_format = "text"                 # or "json"
///
/// [[producer]]
/// name = "payment"
/// status_endpoint = "http://127.0.0.1:7411"   # without it: publish only
/// check_after_ms = 10000
///
/// [[topic]]
/// name = "payment.completed"
/// producers = ["payment"]             # without it: every producer
/// may_have_no_subscriber = false
///
/// [[subscription]]
/// name = "accounting"
/// topic = "payment.completed"
/// attempts = 10                       # or "unlimited"
/// schedule_ms = [45000, 60000, 300000, 900000, 3600000, 14400000, 43200000, 86400000]
/// max_age_s = 86400                   # without it: no limit
/// max_in_queue = 10000                # in RabbitMQ; without it also what 5 s of answers take
/// "#;
/// let config = Config::parse(file, "handfast.toml", Settings::default())?;
/// assert_eq!(config.server.listen.port(), 7400);
/// assert!(config.topology.is_some_and(|topology| topology.has_subscriber("payment.completed")));
/// # Ok::<(), handfast_service::config::Error>(())
/// ```
///
/// Every key may be left out, except the names, a subscription's topic, and
/// `topology_version` where there is a producer, a topic or a subscription.
#[derive(Clone, Debug)]
pub struct Config {
    /// What this process is told.
    pub server: Server,
    /// What the store is told; `None` if the file has no topology, so that the one in force
    /// stays.
    pub topology: Option<Topology>,
}

/// Why a configuration is not usable. The text is one line that ends with the way out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file does not exist.
    #[error(
        "there is no configuration file {path}; name another with --config FILE, or begin with \
         `printf '[server]\\nlisten = \"127.0.0.1:7400\"\\n' > {DEFAULT_FILE}`"
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file exists and cannot be read.
    #[error("cannot read the configuration file {path}: {why}; name another with --config FILE")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        why: String,
    },
    /// Something in it is wrong.
    #[error("{place}: {what}")]
    Invalid {
        /// File and line, or the flag and the variable that were used instead.
        place: String,
        /// What is wrong and what is right.
        what: String,
    },
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    topology_version: Option<u64>,
    server: Settings,
    producer: Vec<ProducerTable>,
    topic: Vec<TopicTable>,
    subscription: Vec<SubscriptionTable>,
}

impl Config {
    /// Reads and checks a file, with what the command line and the environment say instead.
    pub fn load(path: &Path, overrides: Settings) -> Result<Self, Error> {
        let text = read(path)?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// Checks the text of a file, which errors call `name`.
    pub fn parse(text: &str, name: &str, overrides: Settings) -> Result<Self, Error> {
        let source = Source::new(name, text);
        let file: File = toml::from_str(text).map_err(|error| source.syntax(&error))?;
        let merged = overrides.clone().or(file.server.clone());
        let server = Server::check(merged).map_err(|wrong| {
            // The line of the file would mislead where the file was overruled.
            match overrides.source_of(wrong.key()) {
                Some(flag_and_variable) => Error::Invalid {
                    place: flag_and_variable,
                    what: wrong.what,
                },
                None => source.invalid(wrong),
            }
        })?;
        let with_amqp = matches!(server.engines, Engines::Production { .. });
        let topology = topology::check(&file, with_amqp).map_err(|wrong| source.invalid(wrong))?;
        Ok(Self { server, topology })
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |why: String| Error::Unreadable {
        path: path.to_owned(),
        why,
    };
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(unreadable("it is a folder".into())),
        Ok(found) if found.len() > MOST_FILE_BYTES => {
            return Err(unreadable(format!(
                "its {} bytes are over the limit of {MOST_FILE_BYTES} bytes",
                found.len()
            )));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Missing {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(unreadable(error.to_string())),
    }
    std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))
}
