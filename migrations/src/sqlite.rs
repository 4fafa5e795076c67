//! The runner on SQLite.

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use crate::{Database, Owner, SchemaConnection};

impl SchemaConnection for SqliteConnection {
    const DATABASE: Database = Database::Sqlite;

    async fn version(&mut self, owner: Owner) -> Result<i64, sqlx::Error> {
        let exists: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?")
                .bind(owner.version_table())
                .fetch_optional(&mut *self)
                .await?;
        if exists.is_none() {
            return Ok(0);
        }
        sqlx::query_scalar(AssertSqlSafe(owner.read_version()))
            .fetch_one(self)
            .await
    }

    async fn migrate(&mut self, owner: Owner) -> Result<usize, sqlx::Error> {
        // IMMEDIATE, because two processes may start at once: the second waits here and then
        // reads what the first has done.
        let mut tx = self.begin_with("BEGIN IMMEDIATE").await?;
        let missing = owner.missing(Self::DATABASE, tx.version(owner).await?);
        for sql in missing.script {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        Ok(missing.steps)
    }
}
