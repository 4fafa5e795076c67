//! Why a consumer cannot start. What can heal by itself is waited for and is not here.

/// What ends [`run`](crate::Subscriber::run) or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address of the source cannot be read.
    #[error("cannot read the source's address `{address}`: {reason}")]
    Address {
        /// As it was given, without a password.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An option is outside of its range.
    #[error("option {name} is {value}, it must be {range}")]
    Option {
        /// Its name, as in the builder.
        name: &'static str,
        /// As it was given.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// The inbox's database may lose what it acknowledged, and with it the memory of what was
    /// applied.
    #[error("the inbox's database is not durable: {setting} is {found}; set it to {wanted}")]
    NotDurable {
        /// The setting.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// The inbox's schema cannot be brought up to date.
    #[error(transparent)]
    Schema(#[from] handfast_migrations::Error),
    /// The inbox's database cannot be used.
    #[error("cannot {doing} the inbox's database: {source}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// A task of the consumer ended by a panic, which is a bug in it.
    #[error("a task of the consumer failed: {0}")]
    Task(String),
}

impl Error {
    /// True if waiting may help: a database that is locked, full or away.
    pub(crate) fn may_heal(&self) -> bool {
        match self {
            Self::Database { .. } | Self::Schema(handfast_migrations::Error::Database { .. }) => {
                true
            }
            Self::Address { .. }
            | Self::Option { .. }
            | Self::NotDurable { .. }
            | Self::Schema(handfast_migrations::Error::Newer { .. })
            | Self::Task(_) => false,
        }
    }
}
