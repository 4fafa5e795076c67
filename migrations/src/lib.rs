//! Every table Handfast owns, as numbered SQL, and the runner that applies it.
//!
//! The files are `<owner>/<database>/NNNN_name.sql`. Each owner keeps its own version table,
//! because its tables may live in somebody else's database. Migrations only go forward and
//! are never edited once released. [`Owner::print`] gives the same text to a person who
//! applies schemas by hand; afterwards [`Owner::apply`] finds nothing to do.

mod postgres;
mod sqlite;
mod steps;

use std::future::Future;

/// Whose tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The message service's own store.
    MessageService,
    /// The fence, in a producer's database.
    Fence,
    /// The inbox, in a consumer's database.
    Inbox,
}

/// Which kind of database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// An SQLite file.
    Sqlite,
    /// PostgreSQL 14 or later.
    Postgres,
}

impl Database {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Sqlite, Self::Postgres];

    /// The name of its folders.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
        }
    }
}

/// One numbered step of a schema.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Counts from 1 without a gap.
    pub version: i64,
    /// What the file is called behind its number.
    pub name: &'static str,
    /// The statements.
    pub sql: &'static str,
}

/// Why a schema cannot be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database refused a statement.
    #[error("cannot {doing} the schema of the {owner}: {source}")]
    Database {
        /// Whose schema.
        owner: &'static str,
        /// `read` or `migrate`.
        doing: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// A newer program has written to this database.
    #[error(
        "the schema of the {owner} has version {found}, this program knows {known}; \
         use the newer program"
    )]
    Newer {
        /// Whose schema.
        owner: &'static str,
        /// What the database has.
        found: i64,
        /// What this program has.
        known: i64,
    },
}

/// A connection to a database that the schemas are written for.
pub trait SchemaConnection: sqlx::Connection {
    /// Which kind it is.
    const DATABASE: Database;

    /// The version that an owner's schema has; 0 before the first step.
    fn version(&mut self, owner: Owner) -> impl Future<Output = Result<i64, sqlx::Error>> + Send;

    /// Applies what is missing, in one transaction, and returns how many steps that were.
    /// Processes that do so at the same time take turns.
    fn migrate(&mut self, owner: Owner) -> impl Future<Output = Result<usize, sqlx::Error>> + Send;
}

impl Owner {
    /// Every owner.
    pub const ALL: [Self; 3] = [Self::MessageService, Self::Fence, Self::Inbox];

    /// The name of its folder.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MessageService => "message-service",
            Self::Fence => "fence",
            Self::Inbox => "inbox",
        }
    }

    /// The table that holds one row per applied migration.
    pub const fn version_table(self) -> &'static str {
        match self {
            Self::MessageService => "handfast_service_version",
            Self::Fence => "handfast_fence_version",
            Self::Inbox => "handfast_inbox_version",
        }
    }

    /// The whole schema as one script that a person can apply to an empty database.
    pub fn print(self, database: Database) -> String {
        let named = match database {
            Database::Sqlite => "SQLite",
            Database::Postgres => "PostgreSQL",
        };
        let script = self.missing(database, 0).script.join("\n");
        let name = self.name();
        format!("-- handfast: the schema of the {name}, for {named}\nBEGIN;\n\n{script}\nCOMMIT;\n")
    }

    /// The version that the database has; 0 before the first migration.
    pub async fn version<C: SchemaConnection>(self, connection: &mut C) -> Result<i64, Error> {
        connection
            .version(self)
            .await
            .map_err(|source| self.error("read", source))
    }

    /// Applies what is missing, in one transaction, and returns how many steps that were.
    /// A schema newer than this program is refused untouched.
    ///
    /// A dropped future may leave the connection inside a transaction: with one from a pool,
    /// call it in a task of its own.
    pub async fn apply<C: SchemaConnection>(self, connection: &mut C) -> Result<usize, Error> {
        let (found, known) = (self.version(connection).await?, self.latest(C::DATABASE));
        if found > known {
            return Err(Error::Newer {
                owner: self.name(),
                found,
                known,
            });
        }
        if found == known {
            return Ok(0);
        }
        connection
            .migrate(self)
            .await
            .map_err(|source| self.error("migrate", source))
    }

    /// What brings a schema from version `found` to the latest.
    fn missing(self, database: Database, found: i64) -> Missing {
        let mut missing = Missing {
            script: Vec::new(),
            steps: 0,
        };
        if found == 0 {
            missing.script.push(self.create_version_table(database));
        }
        for step in self.steps(database) {
            if step.version > found {
                let (version, name, sql) = (step.version, step.name, step.sql);
                let record = format!(
                    "INSERT INTO {} (version, name) VALUES ({version}, '{name}');",
                    self.version_table()
                );
                missing
                    .script
                    .push(format!("-- {version:04}_{name}\n\n{sql}\n{record}\n"));
                missing.steps += 1;
            }
        }
        missing
    }

    fn create_version_table(self, database: Database) -> String {
        let columns = match database {
            Database::Sqlite => {
                "    version    INTEGER NOT NULL PRIMARY KEY,\n    \
                 name       TEXT    NOT NULL,\n    \
                 applied_at TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP\n"
            }
            Database::Postgres => {
                "    version    bigint      NOT NULL PRIMARY KEY,\n    \
                 name       text        NOT NULL,\n    \
                 applied_at timestamptz NOT NULL DEFAULT clock_timestamp()\n"
            }
        };
        let table = self.version_table();
        format!("CREATE TABLE IF NOT EXISTS {table} (\n{columns});\n")
    }

    fn read_version(self) -> String {
        let table = self.version_table();
        format!("SELECT coalesce(max(version), 0) FROM {table}")
    }

    fn error(self, doing: &'static str, source: sqlx::Error) -> Error {
        Error::Database {
            owner: self.name(),
            doing,
            source,
        }
    }
}

/// What [`Owner::missing`] found.
struct Missing {
    /// Texts of statements, in order.
    script: Vec<String>,
    /// How many of the numbered files are among them.
    steps: usize,
}
