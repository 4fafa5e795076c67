//! `handfast migrate`: the schemas, applied or printed.

use std::io::Write as _;
use std::path::PathBuf;

use handfast_migrations::Owner;
use handfast_service::config::{Config, DEFAULT_FILE, Settings, sqlite_file};
use handfast_service::store::sqlite;

use super::Failure;

/// Bring the schema of the store up to date, or print it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    handfast migrate --store sqlite:handfast.db\n  \
    handfast migrate --print --owner inbox | sqlite3 accounting.db")]
pub(super) struct Args {
    /// The store to migrate: sqlite:FILE [default: the one in the configuration file]
    #[arg(
        long,
        env = "HANDFAST_STORE",
        hide_env_values = true,
        value_name = "URL"
    )]
    store: Option<String>,

    /// The configuration file that names the store [default: handfast.toml]
    #[arg(long, env = "HANDFAST_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the SQL for an empty database and touch nothing
    #[arg(long)]
    print: bool,

    /// Whose schema is printed [default: message-service]
    #[arg(long, requires = "print", value_name = "OWNER", value_parser = owner)]
    owner: Option<Owner>,

    /// Say what was done as one JSON object: {"applied":n,"version":v}
    #[arg(long, conflicts_with = "print")]
    json: bool,
}

fn owner(name: &str) -> Result<Owner, String> {
    Owner::ALL
        .into_iter()
        .find(|owner| owner.name() == name)
        .ok_or_else(|| format!("use {}", Owner::ALL.map(Owner::name).join(", ")))
}

/// Applies or prints.
pub(super) fn run(args: Args) -> Result<(), Failure> {
    if args.print {
        return say(&args.owner.unwrap_or(Owner::MessageService).print());
    }
    let file = store_file(args.store, args.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let applied = runtime.block_on(sqlite::migrate(&file))?;
    let version = Owner::MessageService.latest();
    say(&if args.json {
        format!(
            "{}\n",
            serde_json::json!({ "applied": applied, "version": version })
        )
    } else if applied == 0 {
        format!("{} is up to date at version {version}\n", file.display())
    } else {
        format!("{} is at version {version} now\n", file.display())
    })
}

/// The file that `serve` would open with the same flags in the same place.
fn store_file(store: Option<String>, config: Option<PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(url) = store {
        return sqlite_file(&url).map_err(Failure);
    }
    let path = config.unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
    Ok(Config::load(&path, Settings::default())?.server.store)
}

/// Writes to standard output. A reader that has read enough is no failure.
fn say(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}
