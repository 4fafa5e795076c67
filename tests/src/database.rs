//! A database of either kind, to look at while somebody else writes to it.
//!
//! Statements are the same for both. What differs is read alike: ids are their 16 bytes, times
//! are microseconds since 1970 UTC.

use std::path::Path;
use std::time::Duration;

use sqlx::postgres::{PgPool, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ColumnIndex, Row as _, TypeInfo as _, ValueRef as _};

/// From 1970, where our times begin, to 2000, where PostgreSQL's do.
const MICROS_UNTIL_2000: i64 = 946_684_800_000_000;

/// A database of a world.
#[derive(Clone, Debug)]
pub enum Database {
    /// A file.
    Sqlite(SqlitePool),
    /// A database on a server.
    Postgres(PgPool),
}

impl Database {
    /// Lets go of a file. Connections to a server are the world's.
    pub async fn close(&self) {
        if let Self::Sqlite(pool) = self {
            pool.close().await;
        }
    }

    /// The moment that was so long ago, in this database's words and by its clock.
    pub fn ago(&self, ms: i64) -> String {
        match self {
            Self::Sqlite(_) => {
                format!("(CAST(unixepoch('subsec') * 1000000 AS INTEGER) - {ms} * 1000)")
            }
            Self::Postgres(_) => format!("(clock_timestamp() - {ms} * interval '1 millisecond')"),
        }
    }

    /// Whether there is a table of this name.
    pub async fn has(&self, table: &str) -> bool {
        let sql = match self {
            Self::Sqlite(_) => {
                format!("SELECT count(*) FROM sqlite_schema WHERE name = '{table}'")
            }
            Self::Postgres(_) => {
                format!("SELECT count(*) FROM pg_class WHERE oid = to_regclass('{table}')")
            }
        };
        number(self, &sql).await > 0
    }

    /// Runs statements without parameters.
    pub async fn run(&self, sql: &str) {
        let text = AssertSqlSafe(sql.to_owned());
        let ran = match self {
            Self::Sqlite(pool) => sqlx::raw_sql(text).execute(pool).await.map(drop),
            Self::Postgres(pool) => sqlx::raw_sql(text).execute(pool).await.map(drop),
        };
        ran.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

/// The same words for a pool of either kind: within them, `$pool` is the pool.
#[macro_export]
macro_rules! in_either {
    ($database:expr, $pool:ident => $body:expr) => {
        match $database {
            $crate::database::Database::Sqlite($pool) => $body,
            $crate::database::Database::Postgres($pool) => $body,
        }
    };
}

/// The rows of a query.
pub async fn rows<T: Read>(database: &Database, sql: &str) -> Vec<T> {
    let text = AssertSqlSafe(sql.to_owned());
    let found = match database {
        Database::Sqlite(pool) => {
            let rows = sqlx::query(text).fetch_all(pool).await;
            rows.and_then(|rows| rows.iter().map(|row| T::read(Row::Sqlite(row))).collect())
        }
        Database::Postgres(pool) => {
            let rows = sqlx::query(text).fetch_all(pool).await;
            rows.and_then(|rows| rows.iter().map(|row| T::read(Row::Postgres(row))).collect())
        }
    };
    found.unwrap_or_else(|error: sqlx::Error| panic!("{sql}: {error}"))
}

/// One number.
pub async fn number(database: &Database, sql: &str) -> i64 {
    let mut rows: Vec<(i64,)> = rows(database, sql).await;
    assert_eq!(rows.len(), 1, "{sql}: one row");
    rows.remove(0).0
}

/// A row of either kind.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "rows are not printed")]
pub enum Row<'r> {
    /// Of a file.
    Sqlite(&'r SqliteRow),
    /// Of a server.
    Postgres(&'r PgRow),
}

impl Row<'_> {
    /// A column, by its name or its number.
    pub fn get<T: Value>(
        self,
        column: impl ColumnIndex<SqliteRow> + ColumnIndex<PgRow>,
    ) -> Result<T, sqlx::Error> {
        match self {
            Self::Sqlite(row) => T::of_sqlite(row, column.index(row)?),
            Self::Postgres(row) => T::of_postgres(row, column.index(row)?),
        }
    }
}

/// What is made of a row.
pub trait Read: Sized {
    /// Reads it.
    fn read(row: Row<'_>) -> Result<Self, sqlx::Error>;
}

impl<A: Value> Read for (A,) {
    fn read(row: Row<'_>) -> Result<Self, sqlx::Error> {
        Ok((row.get(0)?,))
    }
}

impl<A: Value, B: Value> Read for (A, B) {
    fn read(row: Row<'_>) -> Result<Self, sqlx::Error> {
        Ok((row.get(0)?, row.get(1)?))
    }
}

/// What is made of a column.
pub trait Value: Sized {
    /// As SQLite has it.
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error>;
    /// As PostgreSQL has it.
    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error>;
}

impl Value for String {
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }

    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }
}

impl Value for bool {
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }

    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }
}

impl Value for i64 {
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }

    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error> {
        let raw = row.try_get_raw(index)?;
        let kind = raw.type_info().name().to_owned();
        match kind.as_str() {
            "INT2" => Ok(row.try_get::<i16, _>(index)?.into()),
            "INT4" => Ok(row.try_get::<i32, _>(index)?.into()),
            "TIMESTAMPTZ" => {
                // Microseconds since 2000, as they come.
                let bytes = raw.as_bytes().map_err(sqlx::Error::Decode)?;
                let bytes: [u8; 8] = bytes
                    .try_into()
                    .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
                Ok(i64::from_be_bytes(bytes) + MICROS_UNTIL_2000)
            }
            _ => row.try_get(index),
        }
    }
}

impl Value for Vec<u8> {
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error> {
        row.try_get(index)
    }

    /// `bytea` and `uuid` come as the same bytes.
    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error> {
        let raw = row.try_get_raw(index)?;
        let bytes = raw.as_bytes().map_err(sqlx::Error::Decode)?;
        Ok(bytes.to_vec())
    }
}

impl<T: Value> Value for Option<T> {
    fn of_sqlite(row: &SqliteRow, index: usize) -> Result<Self, sqlx::Error> {
        if row.try_get_raw(index)?.is_null() {
            return Ok(None);
        }
        T::of_sqlite(row, index).map(Some)
    }

    fn of_postgres(row: &PgRow, index: usize) -> Result<Self, sqlx::Error> {
        if row.try_get_raw(index)?.is_null() {
            return Ok(None);
        }
        T::of_postgres(row, index).map(Some)
    }
}

/// Opens a file that another process writes to, only to look.
pub async fn look_at(path: &Path) -> Database {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(Duration::from_secs(5));
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .connect_with(options)
        .await
        .unwrap_or_else(|error| panic!("cannot look at {}: {error}", path.display()));
    Database::Sqlite(pool)
}
