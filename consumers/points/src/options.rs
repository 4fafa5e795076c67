//! What can be set when points starts.

use std::fmt;

/// Each can be set by a flag or by its environment variable; the flag wins.
#[derive(Clone, clap::Args)]
#[command(after_help = "\
Examples:
  With the message service and its embedded broker, in an SQLite file:
    points --source http://127.0.0.1:7400 --database points.db
  With RabbitMQ and PostgreSQL; the database must exist, the tables are made:
    points --source amqp://guest:guest@127.0.0.1:5672/%2f \\
      --database postgres://postgres@127.0.0.1:5432/points

Whatever is not there yet is waited for.")]
pub struct Options {
    /// Where deliveries come from: the message service (http://…), or RabbitMQ (amqp://…,
    /// several addresses separated by commas)
    #[arg(
        long,
        alias = "service",
        env = "POINTS_SOURCE",
        hide_env_values = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:7400"
    )]
    pub source: String,
    /// The deployment whose queues are consumed; only RabbitMQ has several
    #[arg(
        long,
        env = "POINTS_DEPLOYMENT",
        value_name = "NAME",
        default_value = "handfast"
    )]
    pub deployment: String,
    /// Where grants and inbox are kept: an SQLite file, which is made if it is missing, or a
    /// PostgreSQL database (postgres://…)
    #[arg(
        long,
        env = "POINTS_DATABASE",
        hide_env_values = true,
        value_name = "PATH|URL",
        default_value = "points.db"
    )]
    pub database: String,
    /// How long one transaction may take, in milliseconds
    #[arg(
        long,
        env = "POINTS_HANDLER_TIMEOUT_MS",
        value_name = "MS",
        default_value_t = 25_000,
        value_parser = clap::value_parser!(u64).range(1..=3_600_000)
    )]
    pub handler_timeout_ms: u64,
    /// How many deliveries may be here unanswered, 1 to 10000
    #[arg(
        long,
        env = "POINTS_PREFETCH",
        value_name = "DELIVERIES",
        default_value_t = 200,
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub prefetch: u32,
    /// How many payments one transaction takes at most, 1 to 1000
    #[arg(
        long,
        env = "POINTS_MAX_BATCH",
        value_name = "PAYMENTS",
        default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=1_000)
    )]
    pub max_batch: u32,
}

impl fmt::Debug for Options {
    /// Leaves out what may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("deployment", &self.deployment)
            .field("handler_timeout_ms", &self.handler_timeout_ms)
            .field("prefetch", &self.prefetch)
            .field("max_batch", &self.max_batch)
            .finish_non_exhaustive()
    }
}
