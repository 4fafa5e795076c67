//! From rows to the port's types, and from the database's errors to the port's.

use sqlx::postgres::PgRow;
use sqlx::{Postgres, Row as _};
use uuid::Uuid;

use super::session::{Trouble, trouble};
use super::time::At;
use crate::message::{ContentHash, DeliveryState, MessageId, MessageState, Timestamp};
use crate::store::Error;

/// Turns what the database says while `doing` into the port's error. What cannot be written or
/// read is this program's fault and a repeat will not help; everything else may pass.
pub(super) fn error(doing: &'static str) -> impl Fn(sqlx::Error) -> Error + Copy {
    move |source| match trouble(&source) {
        Trouble::Poison => Error::Inconsistent {
            doing,
            what: source.to_string(),
        },
        Trouble::Repeat | Trouble::Locked | Trouble::NoSuchTable | Trouble::Unavailable => {
            Error::Unavailable { doing, source }
        }
    }
}

/// The error of a call whose rows were never as they had just been read, or stayed locked.
pub(super) fn moved_on(doing: &'static str) -> Error {
    let what = "rows are locked, or change faster than they can be written";
    Error::Unavailable {
        doing,
        source: sqlx::Error::Io(std::io::Error::other(what)),
    }
}

pub(super) fn get<'r, T>(row: &'r PgRow, column: &str) -> Result<T, sqlx::Error>
where
    T: sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>,
{
    row.try_get(column)
}

pub(super) fn id(row: &PgRow, column: &str) -> Result<MessageId, sqlx::Error> {
    get::<Uuid>(row, column).map(MessageId::from)
}

pub(super) fn at(row: &PgRow, column: &str) -> Result<Timestamp, sqlx::Error> {
    get::<At>(row, column).map(|at| at.0)
}

pub(super) fn maybe_at(row: &PgRow, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
    Ok(get::<Option<At>>(row, column)?.map(|at| at.0))
}

pub(super) fn count(row: &PgRow, column: &str) -> Result<u32, sqlx::Error> {
    let number: i64 = get(row, column)?;
    u32::try_from(number).map_err(|_| wrong(column, "is out of range"))
}

/// How many there are of something.
pub(super) fn many(row: &PgRow, column: &str) -> Result<u64, sqlx::Error> {
    get::<i64>(row, column).map(i64::unsigned_abs)
}

/// The state of a message; `Err` inside for one that a newer version has written.
pub(super) fn message_state(
    row: &PgRow,
    doing: &'static str,
) -> Result<Result<MessageState, Error>, sqlx::Error> {
    let word: &str = get(row, "state")?;
    Ok(
        MessageState::from_word(word).ok_or_else(|| Error::Inconsistent {
            doing,
            what: format!("column state is {word}, which this version does not know"),
        }),
    )
}

/// The state of a delivery; `None` for one that a newer version has written.
pub(super) fn delivery_state(row: &PgRow) -> Result<Option<DeliveryState>, sqlx::Error> {
    Ok(DeliveryState::from_word(get(row, "state")?))
}

pub(super) fn wrong(column: &str, what: &str) -> sqlx::Error {
    sqlx::Error::ColumnDecode {
        index: column.to_owned(),
        source: what.to_owned().into(),
    }
}

/// An id as the database has it.
pub(super) fn uuid(id: MessageId) -> Uuid {
    Uuid::from_bytes(*id.as_bytes())
}

/// A length or limit as the database has it.
pub(super) fn long(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn hash(row: &PgRow, column: &str) -> Result<ContentHash, sqlx::Error> {
    let bytes = get::<&[u8]>(row, column)?.try_into();
    bytes
        .map(ContentHash::from_bytes)
        .map_err(|_| wrong(column, "has not 32 bytes"))
}

/// A text for people, without the one character that the database cannot hold.
pub(super) fn clean(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
