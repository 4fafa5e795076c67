//! Which store and which broker: two pairs, and no mixture of them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr as _;

use sqlx::postgres::PgConnectOptions;

use super::place::{Place, Wrong};
use crate::broker::rabbitmq::Addresses;

const STORE: [Place; 2] = [Place::Key("server"), Place::Key("store")];
const BROKER: [Place; 2] = [Place::Key("server"), Place::Key("broker")];
const STORES: &str = "use sqlite:FILE or postgres://USER:PASSWORD@HOST:PORT/DATABASE";
const BROKERS: &str = "use embedded or amqp://USER:PASSWORD@HOST:PORT/VHOST";

/// What keeps messages and what carries them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engines {
    /// One SQLite file; consumers take deliveries from this process.
    Embedded {
        /// The file.
        file: PathBuf,
    },
    /// PostgreSQL and RabbitMQ.
    Production {
        /// Where messages are kept.
        store: PostgresUrl,
        /// What carries deliveries.
        broker: Addresses,
        /// What every name in RabbitMQ begins with.
        deployment: String,
    },
}

/// A URL of a PostgreSQL database that was read once. It may carry a password, so it is never
/// shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PostgresUrl(String);

impl PostgresUrl {
    /// Reads a URL. The error is one line that does not repeat it.
    pub fn parse(url: &str) -> Result<Self, String> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|_| format!("store: this is not a URL of a PostgreSQL database; {STORES}"))?;
        if options.get_database().is_none_or(str::is_empty) {
            return Err(format!("store: the URL names no database; {STORES}"));
        }
        Ok(Self(url.to_owned()))
    }

    /// The text, for whoever connects.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("postgres://…")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Embedded,
    Production,
}

/// The pair. A URL that is not repeated in the error may carry a password.
pub(super) fn check(store: &str, broker: &str, deployment: &str) -> Result<Engines, Wrong> {
    let stored = match scheme(store) {
        Some("sqlite") => Column::Embedded,
        Some("postgres" | "postgresql") => Column::Production,
        other => {
            let other = named(other, "a URL without `:`");
            return Err(Wrong::new(
                STORE,
                format!("store: {other} is not a store; {STORES}"),
            ));
        }
    };
    let carried = match scheme(broker) {
        None if broker == "embedded" => Column::Embedded,
        Some("amqp" | "amqps") => Column::Production,
        other => {
            let other = named(other, "this");
            return Err(Wrong::new(
                BROKER,
                format!("broker: {other} is not a broker; {BROKERS}"),
            ));
        }
    };
    match (stored, carried) {
        (Column::Embedded, Column::Embedded) => Ok(Engines::Embedded {
            file: sqlite_file(store).map_err(|what| Wrong::new(STORE, what))?,
        }),
        (Column::Production, Column::Production) => Ok(Engines::Production {
            store: PostgresUrl::parse(store).map_err(|what| Wrong::new(STORE, what))?,
            broker: Addresses::parse(broker)
                .map_err(|what| Wrong::new(BROKER, format!("broker: {what}")))?,
            deployment: deployment.to_owned(),
        }),
        (Column::Embedded, Column::Production) => Err(mixture("sqlite: and amqp://")),
        (Column::Production, Column::Embedded) => Err(mixture("postgres:// and embedded")),
    }
}

fn mixture(both: &str) -> Wrong {
    Wrong::new(
        BROKER,
        format!(
            "broker: {both} do not go together; use store sqlite:FILE with broker embedded, or \
             store postgres://… with broker amqp://…"
        ),
    )
}

/// The file that a store's URL names: `sqlite:FILE` or `sqlite://FILE`, where a relative FILE
/// is relative to the working directory. The error is one line with the way out.
pub fn sqlite_file(url: &str) -> Result<PathBuf, String> {
    let scheme = scheme(url);
    if scheme != Some("sqlite") {
        return Err(format!(
            "store: {} is not an SQLite file; use sqlite:FILE",
            named(scheme, "a URL without `:`")
        ));
    }
    let path = url.strip_prefix("sqlite:").unwrap_or_default();
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.is_empty() || path == ":memory:" {
        return Err("store: messages need a file to outlive the process; use sqlite:FILE".into());
    }
    if path.contains('?') {
        return Err(
            "store: options behind `?` are not supported, the store sets its own; use sqlite:FILE"
                .into(),
        );
    }
    if path.contains('\0') {
        return Err("store: the file name has a NUL character; use sqlite:FILE".into());
    }
    Ok(PathBuf::from(path))
}

fn scheme(url: &str) -> Option<&str> {
    url.split_once(':').map(|(scheme, _)| scheme)
}

/// What stands before the `:`, as far as it can be shown: it may be long, and a password that
/// was put in the wrong place.
fn named(scheme: Option<&str>, otherwise: &str) -> String {
    match scheme {
        Some(scheme)
            if (1..=16).contains(&scheme.len())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric()) =>
        {
            format!("`{scheme}:`")
        }
        Some(_) => "this".to_owned(),
        None => otherwise.to_owned(),
    }
}
