//! Every table Handfast owns, as numbered SQL, and the runner that applies it.
//!
//! The files are `<owner>/<database>/NNNN_name.sql`. Each owner keeps its own version table,
//! because its tables may live in somebody else's database. Migrations only go forward and
//! are never edited once released. [`Owner::print`] gives the same text to a person who
//! applies schemas by hand; afterwards [`Owner::apply`] finds nothing to do.

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};

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

const MESSAGE_SERVICE: &[Migration] = &[Migration {
    version: 1,
    name: "core",
    sql: include_str!("../message-service/sqlite/0001_core.sql"),
}];

const FENCE: &[Migration] = &[Migration {
    version: 1,
    name: "fence",
    sql: include_str!("../fence/sqlite/0001_fence.sql"),
}];

const INBOX: &[Migration] = &[Migration {
    version: 1,
    name: "inbox",
    sql: include_str!("../inbox/sqlite/0001_inbox.sql"),
}];

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

    /// The steps for SQLite, oldest first.
    pub const fn sqlite(self) -> &'static [Migration] {
        match self {
            Self::MessageService => MESSAGE_SERVICE,
            Self::Fence => FENCE,
            Self::Inbox => INBOX,
        }
    }

    /// The version this program knows.
    pub const fn latest(self) -> i64 {
        let steps = self.sqlite();
        steps[steps.len() - 1].version
    }

    /// The whole schema for SQLite as one script that a person can apply to an empty database.
    pub fn print(self) -> String {
        let mut script = format!(
            "-- handfast: the schema of the {}, for SQLite\nBEGIN;\n\n",
            self.name()
        );
        script.push_str(&self.create_version_table());
        script.push_str(";\n");
        for step in self.sqlite() {
            script.push_str(&format!(
                "\n-- {:04}_{}\n\n{}",
                step.version, step.name, step.sql
            ));
            script.push_str(&format!("\n{};\n", self.record(step)));
        }
        script.push_str("\nCOMMIT;\n");
        script
    }

    /// The version that the database has; 0 before the first migration.
    pub async fn version(self, connection: &mut SqliteConnection) -> Result<i64, Error> {
        let exists: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?")
                .bind(self.version_table())
                .fetch_optional(&mut *connection)
                .await
                .map_err(|source| self.error("read", source))?;
        if exists.is_none() {
            return Ok(0);
        }
        let sql = format!(
            "SELECT coalesce(max(version), 0) FROM {}",
            self.version_table()
        );
        sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(connection)
            .await
            .map_err(|source| self.error("read", source))
    }

    /// Applies what is missing, in one transaction, and returns how many steps that were.
    /// A schema newer than this program is refused untouched.
    pub async fn apply(self, connection: &mut SqliteConnection) -> Result<usize, Error> {
        let found = self.version(connection).await?;
        if found > self.latest() {
            return Err(Error::Newer {
                owner: self.name(),
                found,
                known: self.latest(),
            });
        }
        if found == self.latest() {
            return Ok(0);
        }
        self.migrate(connection)
            .await
            .map_err(|source| self.error("migrate", source))
    }

    async fn migrate(self, connection: &mut SqliteConnection) -> Result<usize, sqlx::Error> {
        // IMMEDIATE, because two processes may start at once: the second waits here and then
        // reads what the first has done.
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(AssertSqlSafe(self.create_version_table()))
            .execute(&mut *tx)
            .await?;
        let sql = format!(
            "SELECT coalesce(max(version), 0) FROM {}",
            self.version_table()
        );
        let found: i64 = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&mut *tx)
            .await?;
        let mut applied = 0;
        for step in self.sqlite().iter().filter(|step| step.version > found) {
            sqlx::raw_sql(step.sql).execute(&mut *tx).await?;
            sqlx::raw_sql(AssertSqlSafe(self.record(step)))
                .execute(&mut *tx)
                .await?;
            applied += 1;
        }
        tx.commit().await?;
        Ok(applied)
    }

    fn create_version_table(self) -> String {
        format!(
            "CREATE TABLE IF NOT EXISTS {} (\n    version    INTEGER NOT NULL PRIMARY KEY,\n    \
             name       TEXT    NOT NULL,\n    applied_at TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP\n)",
            self.version_table()
        )
    }

    fn record(self, step: &Migration) -> String {
        format!(
            "INSERT INTO {} (version, name) VALUES ({}, '{}')",
            self.version_table(),
            step.version,
            step.name
        )
    }

    fn error(self, doing: &'static str, source: sqlx::Error) -> Error {
        Error::Database {
            owner: self.name(),
            doing,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn memory() -> SqliteConnection {
        SqliteConnection::connect("sqlite::memory:").await.unwrap()
    }

    #[tokio::test]
    async fn applying_twice_changes_nothing() {
        for owner in Owner::ALL {
            let mut db = memory().await;
            assert_eq!(owner.apply(&mut db).await.unwrap(), owner.sqlite().len());
            assert_eq!(owner.apply(&mut db).await.unwrap(), 0);
            assert_eq!(owner.version(&mut db).await.unwrap(), owner.latest());
        }
    }

    #[tokio::test]
    async fn what_is_printed_can_be_applied_by_hand() {
        for owner in Owner::ALL {
            let mut db = memory().await;
            sqlx::raw_sql(AssertSqlSafe(owner.print()))
                .execute(&mut db)
                .await
                .unwrap();
            assert_eq!(owner.apply(&mut db).await.unwrap(), 0, "{}", owner.name());
        }
    }

    #[tokio::test]
    async fn all_owners_share_one_database() {
        let mut db = memory().await;
        for owner in Owner::ALL {
            owner.apply(&mut db).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_newer_schema_is_refused() {
        let mut db = memory().await;
        Owner::Fence.apply(&mut db).await.unwrap();
        sqlx::query("INSERT INTO handfast_fence_version (version, name) VALUES (99, 'later')")
            .execute(&mut db)
            .await
            .unwrap();
        let error = Owner::Fence.apply(&mut db).await.unwrap_err();
        assert!(matches!(error, Error::Newer { found: 99, .. }), "{error}");
    }

    #[test]
    fn versions_count_without_a_gap() {
        for owner in Owner::ALL {
            for (index, step) in owner.sqlite().iter().enumerate() {
                assert_eq!(step.version, index as i64 + 1);
            }
        }
    }
}
