//! Which store and which broker: two pairs, and only one of them is there so far.

use std::path::PathBuf;

use super::place::{Place, Wrong};

const STORE: [Place; 2] = [Place::Key("server"), Place::Key("store")];
const BROKER: [Place; 2] = [Place::Key("server"), Place::Key("broker")];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Embedded,
    Production,
}

/// The SQLite file of the pair. A URL that is not repeated in the error may carry a password.
pub(super) fn check(store: &str, broker: &str) -> Result<PathBuf, Wrong> {
    let stored = match scheme(store) {
        Some("sqlite") => Column::Embedded,
        Some("postgres" | "postgresql") => Column::Production,
        other => {
            return Err(Wrong::new(
                STORE,
                format!(
                    "store: {} is not a store; use sqlite:FILE",
                    named(other, "a URL without `:`")
                ),
            ));
        }
    };
    let carried = match scheme(broker) {
        None if broker == "embedded" => Column::Embedded,
        Some("amqp" | "amqps") => Column::Production,
        other => {
            return Err(Wrong::new(
                BROKER,
                format!(
                    "broker: {} is not a broker; use embedded",
                    named(other, "this")
                ),
            ));
        }
    };
    match (stored, carried) {
        (Column::Embedded, Column::Embedded) => {
            sqlite_file(store).map_err(|what| Wrong::new(STORE, what))
        }
        (Column::Production, Column::Production) => Err(Wrong::new(
            STORE,
            "store: postgres:// is not supported yet; use sqlite:FILE with broker embedded",
        )),
        (Column::Embedded, Column::Production) => Err(mixture("sqlite: and amqp://")),
        (Column::Production, Column::Embedded) => Err(mixture("postgres:// and embedded")),
    }
}

fn mixture(both: &str) -> Wrong {
    Wrong::new(
        BROKER,
        format!(
            "broker: {both} do not go together; use store sqlite:FILE with broker embedded \
             (postgres:// with amqp:// is not supported yet)"
        ),
    )
}

/// The file that a store's URL names: `sqlite:FILE` or `sqlite://FILE`, where a relative FILE
/// is relative to the working directory. The error is one line with the way out.
pub fn sqlite_file(url: &str) -> Result<PathBuf, String> {
    match scheme(url) {
        Some("sqlite") => {}
        Some("postgres" | "postgresql") => {
            return Err("store: postgres:// is not supported yet; use sqlite:FILE".into());
        }
        other => {
            return Err(format!(
                "store: {} is not a store; use sqlite:FILE",
                named(other, "a URL without `:`")
            ));
        }
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
