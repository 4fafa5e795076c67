//! The numbered files, per owner and database.

use crate::{Database, Migration, Owner};

/// One file as a step.
macro_rules! step {
    ($version:literal, $name:literal, $file:literal) => {
        Migration {
            version: $version,
            name: $name,
            sql: include_str!($file),
        }
    };
}

impl Owner {
    /// The steps for one database, oldest first.
    pub const fn steps(self, database: Database) -> &'static [Migration] {
        match (self, database) {
            (Self::MessageService, Database::Sqlite) => {
                &[step!(1, "core", "../message-service/sqlite/0001_core.sql")]
            }
            (Self::MessageService, Database::Postgres) => &[
                step!(1, "core", "../message-service/postgres/0001_core.sql"),
                step!(
                    2,
                    "replicas",
                    "../message-service/postgres/0002_replicas.sql"
                ),
                step!(3, "turns", "../message-service/postgres/0003_turns.sql"),
                step!(
                    4,
                    "room_in_pages",
                    "../message-service/postgres/0004_room_in_pages.sql"
                ),
            ],
            (Self::Fence, Database::Sqlite) => {
                &[step!(1, "fence", "../fence/sqlite/0001_fence.sql")]
            }
            (Self::Fence, Database::Postgres) => {
                &[step!(1, "fence", "../fence/postgres/0001_fence.sql")]
            }
            (Self::Inbox, Database::Sqlite) => {
                &[step!(1, "inbox", "../inbox/sqlite/0001_inbox.sql")]
            }
            (Self::Inbox, Database::Postgres) => {
                &[step!(1, "inbox", "../inbox/postgres/0001_inbox.sql")]
            }
        }
    }

    /// The version this program knows for one database; 0 if it has nothing for it.
    pub const fn latest(self, database: Database) -> i64 {
        match self.steps(database) {
            [] => 0,
            [.., last] => last.version,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_count_without_a_gap() {
        for owner in Owner::ALL {
            for database in Database::ALL {
                for (index, step) in owner.steps(database).iter().enumerate() {
                    assert_eq!(step.version, index as i64 + 1);
                }
            }
        }
    }
}
