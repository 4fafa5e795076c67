//! What can be set when accounting starts.

use std::path::PathBuf;

/// Each can be set by a flag or by its environment variable; the flag wins.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Address of the message service
    #[arg(
        long,
        env = "ACCOUNTING_SERVICE",
        value_name = "URL",
        default_value = "http://127.0.0.1:7400"
    )]
    pub service: String,
    /// SQLite file for vouchers and inbox; it is made if it is missing
    #[arg(
        long,
        env = "ACCOUNTING_DATABASE",
        value_name = "PATH",
        default_value = "accounting.db"
    )]
    pub database: PathBuf,
    /// How long one transaction may take, in milliseconds
    #[arg(
        long,
        env = "ACCOUNTING_HANDLER_TIMEOUT_MS",
        value_name = "MS",
        default_value_t = 25_000,
        value_parser = clap::value_parser!(u64).range(1..=3_600_000)
    )]
    pub handler_timeout_ms: u64,
    /// How many deliveries may be here unanswered, 1 to 10000
    #[arg(
        long,
        env = "ACCOUNTING_PREFETCH",
        value_name = "DELIVERIES",
        default_value_t = 200,
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub prefetch: u32,
    /// How many payments one transaction takes at most, 1 to 1000
    #[arg(
        long,
        env = "ACCOUNTING_MAX_BATCH",
        value_name = "PAYMENTS",
        default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=1_000)
    )]
    pub max_batch: u32,
}
