//! `handfast migrate`: the schemas, applied or printed.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Parser as _;
use handfast_migrations::{Database, Owner};
use handfast_service::config::{Config, DEFAULT_FILE, Engines, Settings, sqlite_file};
use handfast_service::store::{postgres, sqlite};

use super::{Failure, usage};

/// Bring the schema of the store up to date, or print it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without --store it is the store that serve would open here: what the \
    environment says instead of the file holds for both.\n\n\
    Examples:\n  \
    handfast migrate --store sqlite:handfast.db\n  \
    handfast migrate --store postgres://handfast@localhost/handfast\n  \
    handfast migrate --print --owner inbox | sqlite3 accounting.db\n  \
    handfast migrate --print --owner fence --database postgres | psql shop"
)]
pub(super) struct Args {
    /// The store to migrate: sqlite:FILE or postgres://… [default: the one in the configuration
    /// file]
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

    /// For which kind of database it is printed [default: sqlite]
    #[arg(long, requires = "print", value_name = "KIND", value_parser = database)]
    database: Option<Database>,

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

fn database(name: &str) -> Result<Database, String> {
    Database::ALL
        .into_iter()
        .find(|database| database.name() == name)
        .ok_or_else(|| format!("use {}", Database::ALL.map(Database::name).join(" or ")))
}

/// What the environment tells `serve`, whose flags `migrate` does not take.
#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true)]
struct Environment {
    #[command(flatten)]
    settings: Settings,
}

impl Environment {
    fn read() -> Result<Settings, Failure> {
        let nothing: [&str; 0] = [];
        match Self::try_parse_from(nothing) {
            Ok(environment) => Ok(environment.settings),
            Err(error) => Err(Failure(format!(
                "the environment of serve is wrong: {}",
                usage::line(&error.to_string())
            ))),
        }
    }
}

/// Where the store is.
enum Place {
    File(PathBuf),
    // Boxed, because it is much larger than a path.
    Server(Box<postgres::Address>),
}

/// Applies or prints.
pub(super) fn run(args: Args) -> Result<(), Failure> {
    if args.print {
        let owner = args.owner.unwrap_or(Owner::MessageService);
        return say(&owner.print(args.database.unwrap_or(Database::Sqlite)));
    }
    let place = place(args.store, args.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (applied, database) = match &place {
        Place::File(file) => (runtime.block_on(sqlite::migrate(file))?, Database::Sqlite),
        Place::Server(address) => (
            runtime.block_on(postgres::migrate((**address).clone()))?,
            Database::Postgres,
        ),
    };
    let (name, version) = (place.name(), Owner::MessageService.latest(database));
    say(&if args.json {
        format!(
            "{}\n",
            serde_json::json!({ "applied": applied, "version": version })
        )
    } else if applied == 0 {
        format!("{name} is up to date at version {version}\n")
    } else {
        format!("{name} is at version {version} now\n")
    })
}

/// The store that `serve` would open with the same flags in the same place. A pair of engines may
/// be named half in the file and half in the environment, so both are read.
fn place(store: Option<String>, config: Option<PathBuf>) -> Result<Place, Failure> {
    let url = match store {
        Some(url) => url,
        None => {
            let path = config.unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
            match Config::load(&path, Environment::read()?)?.server.engines {
                Engines::Embedded { file } => return Ok(Place::File(file)),
                Engines::Production { store, .. } => store.as_str().to_owned(),
            }
        }
    };
    if !["postgres://", "postgresql://"]
        .iter()
        .any(|scheme| url.starts_with(scheme))
    {
        return sqlite_file(&url).map(Place::File).map_err(Failure);
    }
    Ok(Place::Server(Box::new(url.parse()?)))
}

impl Place {
    /// For people; without a password.
    fn name(&self) -> String {
        match self {
            Self::File(file) => file.display().to_string(),
            Self::Server(address) => address.to_string(),
        }
    }
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
