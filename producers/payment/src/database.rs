//! Where the service keeps its tables.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;

/// An SQLite file, or a database of PostgreSQL.
#[derive(Clone)]
pub enum Database {
    /// Made if it does not exist.
    File(PathBuf),
    /// Waited for if it cannot be reached. Boxed, because it is much larger than a path.
    Server(Box<PgConnectOptions>),
}

impl Database {
    /// Reads `postgres://…`; everything else is the name of a file, with `sqlite:` before it or
    /// without.
    pub fn parse(text: &str) -> Result<Self, String> {
        let server = ["postgres://", "postgresql://"];
        if !server.iter().any(|scheme| text.starts_with(scheme)) {
            let file = text.strip_prefix("sqlite:").unwrap_or(text);
            if file.is_empty() {
                return Err("use FILE or postgres://USER@HOST/DATABASE".to_owned());
            }
            return Ok(Self::File(file.into()));
        }
        // What is wrong is said without the URL, which may carry a password.
        let options = PgConnectOptions::from_str(text).map_err(|error| error.to_string())?;
        Ok(Self::Server(Box::new(options)))
    }
}

/// For people; without user and password.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Server(options) => write!(
                f,
                "postgres://{}:{}/{}",
                options.get_host(),
                options.get_port(),
                options.get_database().unwrap_or_default()
            ),
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_server_and_everything_else_a_file() {
        for file in ["payment.db", "sqlite:payment.db"] {
            assert_eq!(Database::parse(file).unwrap().to_string(), "payment.db");
        }
        let server = Database::parse("postgres://me:secret@db.example/shop").unwrap();
        assert_eq!(server.to_string(), "postgres://db.example:5432/shop");
        assert!(!format!("{server:?}").contains("secret"));
        let wrong = Database::parse("postgres://me:secret@db.example:port/shop").unwrap_err();
        assert!(!wrong.contains("secret"), "{wrong}");
        assert!(Database::parse("sqlite:").is_err());
    }
}
