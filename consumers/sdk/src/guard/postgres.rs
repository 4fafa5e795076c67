//! The guard's two statements in PostgreSQL.

use sqlx::{AssertSqlSafe, PgConnection};

use super::{Columns, GuardConnection, Key};

impl GuardConnection for PgConnection {
    async fn read_state(
        &mut self,
        columns: &Columns,
        key: &Key,
    ) -> Result<Option<String>, sqlx::Error> {
        let sql = format!(
            r#"SELECT "{}"::text FROM "{}" WHERE "{}" = $1 FOR UPDATE"#,
            columns.state, columns.table, columns.key
        );
        // The names are plain identifiers, which `Unordered::order` has checked.
        let query = sqlx::query_scalar(AssertSqlSafe(sql));
        let query = match key {
            Key::Integer(key) => query.bind(*key),
            Key::Text(key) => query.bind(key.clone()),
            Key::Bytes(key) => query.bind(key.clone()),
            Key::Uuid(key) => query.bind(*key),
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
        // Whoever changes the row at the same time is waited for, and then its state is
        // compared once more.
        let sql = format!(
            r#"UPDATE "{table}" SET "{state}" = $1 WHERE "{key}" = $3 AND "{state}" = $2"#,
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
            Key::Uuid(key) => query.bind(*key),
        };
        Ok(query.execute(self).await?.rows_affected() > 0)
    }
}
