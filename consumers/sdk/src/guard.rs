//! The state guard: messages may overtake each other, states must not be skipped.
//!
//! A guard knows the order of the states of one column of the program's own table. It moves a
//! row from one state to the next and names every other case. It does not know whether *this
//! message* was applied before: that is the inbox's word, and the guard is asked only for
//! messages that are new.

mod postgres;
mod sqlite;

use std::future::Future;

use sqlx::Connection;
use uuid::Uuid;

/// What became of a transition that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The row was in `from` and is now in `to`.
    Applied,
    /// The row is in `to` already, and this message did not do it: the inbox would have known
    /// it. Whether a second fact of the same kind is harmless or a mistake is the handler's
    /// to say.
    AlreadyApplied,
    /// The row has not come to `from` yet, or is not there yet: what leads there is still on
    /// its way. Answer [`Later`](crate::Answer::Later).
    TooEarly,
    /// The row is beyond `from`, or in a state that the guard does not know. Waiting does not
    /// help; [`Rejected`](crate::Answer::Rejected) shows it to a person.
    Refused(String),
}

/// Why a guard cannot be made or asked.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// A table or column name is not a plain identifier.
    #[error("`{0}` cannot be the name of a table or column: use letters, digits and `_`")]
    Name(String),
    /// The order has fewer than two states, or one twice.
    #[error("the order of states {0:?} needs at least two, each once")]
    Order(Vec<String>),
    /// The order does not lead from the one state to the other.
    #[error("no transition from `{from}` to `{to}` in the order of states")]
    NoSuchTransition {
        /// The state to leave.
        from: String,
        /// The state to reach.
        to: String,
    },
    /// The database refused a statement.
    #[error("cannot {doing} the state in `{table}`: {source}")]
    Database {
        /// `read` or `change`.
        doing: &'static str,
        /// The guarded table.
        table: String,
        /// What the database said.
        source: sqlx::Error,
    },
}

/// The value of the key column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// An integer.
    Integer(i64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A UUID: of that type in PostgreSQL, its 16 bytes in SQLite.
    Uuid(Uuid),
}

/// Knows a table, its key and state columns, and the order of the states.
///
/// ```
/// # use handfast_consumer::{Guard, Transition, Tx, Answer};
/// # use std::time::Duration;
/// # async fn refund(tx: &mut Tx, order_id: &str) -> Result<Answer, Box<dyn std::error::Error>> {
/// let orders = Guard::new("shop_order", "id", "state").order(&["processing", "paid", "refunded"])?;
/// Ok(match orders.transition(tx, order_id, "paid", "refunded").await? {
///     Transition::Applied => Answer::Consumed,
///     Transition::AlreadyApplied => Answer::rejected("refunded before, by another message"),
///     Transition::TooEarly => Answer::Later(Duration::from_secs(5)),
///     Transition::Refused(state) => Answer::rejected(format!("the order is {state}")),
/// })
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Guard {
    columns: Columns,
    states: Vec<String>,
}

/// A guard that does not know the order of the states yet.
#[derive(Clone, Debug)]
pub struct Unordered(Columns);

/// Where a guard's states are. The names are plain identifiers: a letter or `_`, then letters,
/// digits and `_`, at most 63 of them.
#[derive(Clone, Debug)]
pub struct Columns {
    /// The table.
    pub table: String,
    /// The column that finds a row.
    pub key: String,
    /// The column that holds the state, as text.
    pub state: String,
}

/// A connection whose database can be guarded.
pub trait GuardConnection: Connection {
    /// Reads the state of the key's row, if there is one, and keeps others from changing it
    /// until the transaction ends.
    fn read_state(
        &mut self,
        columns: &Columns,
        key: &Key,
    ) -> impl Future<Output = Result<Option<String>, sqlx::Error>> + Send;

    /// Sets the state of the key's row to `to` if it is `from`. True if it was.
    fn change_state(
        &mut self,
        columns: &Columns,
        key: &Key,
        from: &str,
        to: &str,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;
}

impl Guard {
    /// Begins a guard over `state_column` of `table`, whose rows are found by `key_column`.
    #[expect(
        clippy::new_ret_no_self,
        reason = "a guard without the order of states must not exist"
    )]
    pub fn new(
        table: impl Into<String>,
        key_column: impl Into<String>,
        state_column: impl Into<String>,
    ) -> Unordered {
        Unordered(Columns {
            table: table.into(),
            key: key_column.into(),
            state: state_column.into(),
        })
    }

    /// Moves the row of `key` from `from` to `to` within the transaction, if it is in `from`.
    ///
    /// | the row's state | answer |
    /// |---|---|
    /// | `from` | [`Applied`](Transition::Applied) |
    /// | `to` | [`AlreadyApplied`](Transition::AlreadyApplied) |
    /// | before `from` in the order, or there is no row | [`TooEarly`](Transition::TooEarly) |
    /// | anything else | [`Refused`](Transition::Refused) with the state |
    ///
    /// It is an error if `to` does not come after `from` in the order.
    pub async fn transition<C: GuardConnection>(
        &self,
        tx: &mut C,
        key: impl Into<Key>,
        from: &str,
        to: &str,
    ) -> Result<Transition, GuardError> {
        let key = key.into();
        let no_such_transition = || GuardError::NoSuchTransition {
            from: from.to_owned(),
            to: to.to_owned(),
        };
        let start = self.position(from).ok_or_else(no_such_transition)?;
        if self.position(to).is_none_or(|end| end <= start) {
            return Err(no_such_transition());
        }
        let changed = tx
            .change_state(&self.columns, &key, from, to)
            .await
            .map_err(|source| self.error("change", source))?;
        if changed {
            return Ok(Transition::Applied);
        }
        let current = tx
            .read_state(&self.columns, &key)
            .await
            .map_err(|source| self.error("read", source))?;
        if current.as_deref() == Some(from) {
            // Another transaction has moved it there between the two statements. Reading has
            // locked it, so nobody moves it away before the third.
            let changed = tx.change_state(&self.columns, &key, from, to).await;
            if changed.map_err(|source| self.error("change", source))? {
                return Ok(Transition::Applied);
            }
        }
        Ok(match current {
            None => Transition::TooEarly,
            Some(state) if state == to => Transition::AlreadyApplied,
            Some(state) => match self.position(&state) {
                Some(position) if position < start => Transition::TooEarly,
                Some(_) | None => Transition::Refused(state),
            },
        })
    }

    fn position(&self, state: &str) -> Option<usize> {
        self.states.iter().position(|known| known == state)
    }

    fn error(&self, doing: &'static str, source: sqlx::Error) -> GuardError {
        GuardError::Database {
            doing,
            table: self.columns.table.clone(),
            source,
        }
    }
}

impl Unordered {
    /// The states, from the first to the last. Names and order are checked here.
    pub fn order(self, states: &[&str]) -> Result<Guard, GuardError> {
        let Self(columns) = self;
        for name in [&columns.table, &columns.key, &columns.state] {
            if !is_plain(name) {
                return Err(GuardError::Name(name.clone()));
            }
        }
        let states: Vec<String> = states.iter().copied().map(str::to_owned).collect();
        let twice = (1..states.len()).any(|at| states[..at].contains(&states[at]));
        if states.len() < 2 || twice {
            return Err(GuardError::Order(states));
        }
        Ok(Guard { columns, states })
    }
}

/// Names become part of a statement's text, so nothing that could end a name is let in.
fn is_plain(name: &str) -> bool {
    name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

impl From<i64> for Key {
    fn from(key: i64) -> Self {
        Self::Integer(key)
    }
}

impl From<&str> for Key {
    fn from(key: &str) -> Self {
        Self::Text(key.to_owned())
    }
}

impl From<String> for Key {
    fn from(key: String) -> Self {
        Self::Text(key)
    }
}

impl From<&[u8]> for Key {
    fn from(key: &[u8]) -> Self {
        Self::Bytes(key.to_vec())
    }
}

impl From<Uuid> for Key {
    fn from(key: Uuid) -> Self {
        Self::Uuid(key)
    }
}
