//! The guard's two statements in SQLite.

use sqlx::{AssertSqlSafe, SqliteConnection};

use super::{Columns, GuardConnection, Key};

impl GuardConnection for SqliteConnection {
    async fn read_state(
        &mut self,
        columns: &Columns,
        key: &Key,
    ) -> Result<Option<String>, sqlx::Error> {
        // The transaction began IMMEDIATE: nobody else writes until it ends.
        let sql = format!(
            r#"SELECT "{}" FROM "{}" WHERE "{}" = ?1"#,
            columns.state, columns.table, columns.key
        );
        // The names are plain identifiers, which `Unordered::order` has checked.
        let query = sqlx::query_scalar(AssertSqlSafe(sql));
        let query = match key {
            Key::Integer(key) => query.bind(*key),
            Key::Text(key) => query.bind(key.clone()),
            Key::Bytes(key) => query.bind(key.clone()),
            Key::Uuid(key) => query.bind(key.as_bytes().to_vec()),
        };
        query.fetch_optional(self).await
    }

    async fn change_state(
        &mut self,
        columns: &Columns,
        key: &Key,
        from: &str,
        to: &str,
    ) -> Result<bool, sqlx::Error> {
        let sql = format!(
            r#"UPDATE "{table}" SET "{state}" = ?1 WHERE "{key}" = ?3 AND "{state}" = ?2"#,
            table = columns.table,
            state = columns.state,
            key = columns.key
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(to.to_owned())
            .bind(from.to_owned());
        let query = match key {
            Key::Integer(key) => query.bind(*key),
            Key::Text(key) => query.bind(key.clone()),
            Key::Bytes(key) => query.bind(key.clone()),
            Key::Uuid(key) => query.bind(key.as_bytes().to_vec()),
        };
        Ok(query.execute(self).await?.rows_affected() > 0)
    }
}
