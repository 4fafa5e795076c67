//! From rows to the port's types, and from the database's errors to the port's.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use uuid::Uuid;

use crate::message::{MessageId, Timestamp};
use crate::store::Error;

/// Turns what the database says while `doing` into the port's error. Broken constraints are
/// this program's fault and a repeat will not help; everything else may pass.
pub(super) fn error(doing: &'static str) -> impl Fn(sqlx::Error) -> Error + Copy {
    move |source| match &source {
        sqlx::Error::Database(cause) if cause.kind() != sqlx::error::ErrorKind::Other => {
            Error::Inconsistent {
                doing,
                what: source.to_string(),
            }
        }
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => Error::Inconsistent {
            doing,
            what: source.to_string(),
        },
        _ => Error::Unavailable { doing, source },
    }
}

/// The columns of a row by name, with the error that says which one is wrong.
pub(super) struct Columns<'r> {
    pub(super) row: &'r SqliteRow,
    pub(super) doing: &'static str,
}

impl<'r> Columns<'r> {
    pub(super) fn new(row: &'r SqliteRow, doing: &'static str) -> Self {
        Self { row, doing }
    }

    pub(super) fn get<T>(&self, column: &str) -> Result<T, Error>
    where
        T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
    {
        self.row.try_get(column).map_err(error(self.doing))
    }

    pub(super) fn id(&self, column: &str) -> Result<MessageId, Error> {
        let bytes: &[u8] = self.get(column)?;
        MessageId::from_bytes(bytes).ok_or_else(|| self.wrong(column, "is not a message id"))
    }

    pub(super) fn uuid(&self, column: &str) -> Result<Option<Uuid>, Error> {
        let bytes: Option<&[u8]> = self.get(column)?;
        bytes
            .map(|bytes| Uuid::from_slice(bytes).map_err(|_| self.wrong(column, "is not a uuid")))
            .transpose()
    }

    pub(super) fn time(&self, column: &str) -> Result<Timestamp, Error> {
        self.get(column).map(Timestamp::from_micros)
    }

    pub(super) fn maybe_time(&self, column: &str) -> Result<Option<Timestamp>, Error> {
        Ok(self.get::<Option<i64>>(column)?.map(Timestamp::from_micros))
    }

    pub(super) fn count(&self, column: &str) -> Result<u32, Error> {
        let number: i64 = self.get(column)?;
        u32::try_from(number).map_err(|_| self.wrong(column, "is out of range"))
    }

    pub(super) fn wrong(&self, column: &str, what: &str) -> Error {
        Error::Inconsistent {
            doing: self.doing,
            what: format!("column {column} {what}"),
        }
    }
}
