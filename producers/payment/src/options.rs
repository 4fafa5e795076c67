//! What the service can be told at start, by flag or environment.

use std::net::SocketAddr;
use std::time::Duration;

use crate::database::Database;

/// Flags; each can also be set by the environment variable that its help names.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the payment API listens.
    #[arg(long, env = "PAYMENT_LISTEN", default_value = "127.0.0.1:7410")]
    pub listen: SocketAddr,

    /// Where the status server listens; this is the producer's endpoint in Handfast's
    /// configuration.
    #[arg(long, env = "PAYMENT_STATUS_LISTEN", default_value = "127.0.0.1:7411")]
    pub status_listen: SocketAddr,

    /// Where Handfast is; several addresses with commas. It may start later.
    #[arg(long, env = "PAYMENT_SERVICE", default_value = "http://127.0.0.1:7400")]
    pub service: String,

    /// An SQLite file, made if it does not exist, or postgres://USER@HOST/DATABASE.
    #[arg(
        long,
        env = "PAYMENT_DATABASE",
        hide_env_values = true,
        default_value = "payment.db",
        value_parser = Database::parse
    )]
    pub database: Database,

    /// Allow addresses that are not loopback, though there is no authentication.
    #[arg(long, env = "PAYMENT_INSECURE_LISTEN")]
    pub insecure_listen: bool,

    /// How often the job looks for unfinished payments, in milliseconds.
    #[arg(
        long,
        env = "PAYMENT_JOB_INTERVAL_MS",
        default_value_t = 1_000,
        value_parser = clap::value_parser!(u64).range(10..=3_600_000)
    )]
    pub job_interval_ms: u64,

    /// After this a call is answered PROCESSING, in milliseconds.
    #[arg(
        long,
        env = "PAYMENT_PAY_DEADLINE_MS",
        default_value_t = 10_000,
        value_parser = clap::value_parser!(u64).range(10..=60_000)
    )]
    pub pay_deadline_ms: u64,
}

impl Options {
    /// How often the job runs.
    pub fn job_interval(&self) -> Duration {
        Duration::from_millis(self.job_interval_ms)
    }

    /// How long a call waits for its payment.
    pub fn pay_deadline(&self) -> Duration {
        Duration::from_millis(self.pay_deadline_ms)
    }
}
