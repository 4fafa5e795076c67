//! The fence: one row per message in the producer's own database, which makes a verdict final.
//!
//! The business transaction writes COMMITTED as its first statement; a status check, or the
//! SDK after a rollback, writes ROLLED_BACK. The primary key lets exactly one of them win: who
//! comes second reads what the first has written. So a verdict, once given, stays true.
//!
//! [`FenceDatabase`] is what a kind of database must be able to do; [`sqlite`] and [`postgres`]
//! do it.

pub mod postgres;
pub mod sqlite;

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use handfast_fail_points::{Point, hit};
use sqlx::pool::PoolConnection;
use sqlx::{Connection, Database, Pool};
use tokio::time::Instant;
use uuid::Uuid;

use crate::bounded::{until, within};

/// How long a fence row is kept unless told otherwise.
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Fence rows that one statement of [`Fence::prune`] removes at most.
pub const PRUNE_SLICE_ROWS: u32 = 1_000;

/// An answer that takes longer will not come: the connection is given up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that status checks use at most.
const CHECK_CONNECTIONS: u32 = 2;
/// A status check does not wait longer than this for one of them.
const CHECK_ACQUIRE_WAIT: Duration = Duration::from_secs(2);

/// Pools whose fence a producer remembers; the oldest is read again.
const MAX_KNOWN_FENCES: usize = 64;

/// Which database a fence stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FenceIdentity([u8; 16]);

impl FenceIdentity {
    /// The identity with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// As prepare and check carry it.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for FenceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

/// What a fence row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceVerdict {
    /// The business transaction committed.
    Committed,
    /// It did not, and can never.
    RolledBack,
}

impl FenceVerdict {
    /// As the table spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Committed => "COMMITTED",
            Self::RolledBack => "ROLLED_BACK",
        }
    }
}

/// What a fence says after it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The business transaction committed; final.
    Committed,
    /// It can never commit; final.
    RolledBack,
    /// Somebody holds a lock, probably the business itself; ask again.
    InProgress,
}

/// Why a fence cannot be relied on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceError {
    /// The database did not answer.
    #[error("cannot {doing} the fence: {source}")]
    Database {
        /// `read`, `migrate` or `prune`.
        doing: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// There is no fence in the database.
    #[error("cannot read the fence: its tables are missing; call `migrate` first ({source})")]
    Missing {
        /// What the database said.
        source: sqlx::Error,
    },
    /// A committed transaction could be lost with the power.
    #[error("cannot rely on the fence: the database is not durable, {setting}; {remedy}")]
    NotDurable {
        /// What was found.
        setting: String,
        /// What to set.
        remedy: &'static str,
    },
    /// A status check could never look at the database.
    #[error(
        "cannot rely on the fence: the database is locked by one connection; \
         open the pool with locking mode NORMAL"
    )]
    Exclusive,
    /// The status checks would look at another fence than the business writes to.
    #[error(
        "cannot rely on the fence: a new connection of the pool does not find the fence that the \
         pool finds; choose the schema in the connect options or in `after_connect`, for every \
         connection"
    )]
    Elsewhere,
    /// The schema could not be applied.
    #[error(transparent)]
    Migrate(#[from] handfast_migrations::Error),
}

/// What a kind of database must be able to do to carry a fence.
///
/// Each method is one small step, so that what must happen in which order is written once, in
/// this module. A future of this trait may be polled in a task of its own.
pub trait FenceDatabase: Database {
    /// Begins a business transaction, in which the fence row can be inserted without a deadlock
    /// and whose commit is durable.
    const BEGIN: &'static str;

    /// Begins the transaction of one question: it sees, in each statement, what was committed
    /// before that statement, and its commit is durable.
    const BEGIN_CHECK: &'static str;

    /// Applies the fence's schema; a repeat changes nothing.
    fn migrate(pool: &Pool<Self>) -> impl Future<Output = Result<(), FenceError>> + Send;

    /// Reads the identity, and refuses a database whose commits are not durable.
    fn identity(
        pool: &Pool<Self>,
    ) -> impl Future<Output = Result<FenceIdentity, FenceError>> + Send;

    /// How status checks connect to the pool's database, so that their statements wait at most
    /// 200 ms for a lock.
    fn check_options(pool: &Pool<Self>) -> <Self::Connection as Connection>::Options;

    /// From here on nothing is committed on this connection, whatever the business does: where
    /// the database may end a transaction by itself, what is written afterwards would be
    /// committed without the fence row.
    fn hold(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Undoes [`hold`](Self::hold).
    fn release(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Whether the transaction in which the fence row was inserted is over in a way that leaves
    /// the connection outside of it, where a rollback would fail.
    fn has_ended(
        connection: &mut Self::Connection,
        id: Uuid,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;

    /// Whether COMMIT would commit the transaction in which the fence row was inserted, or say
    /// that it did not. An error means that it would not.
    fn may_commit(
        connection: &mut Self::Connection,
        id: Uuid,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;

    /// Inserts a row unless there is one; waits for whoever is inserting the same. True if it
    /// was inserted.
    fn insert(
        connection: &mut Self::Connection,
        id: Uuid,
        verdict: FenceVerdict,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;

    /// Reads a row, in a statement of its own after [`insert`](Self::insert).
    fn read(
        connection: &mut Self::Connection,
        id: Uuid,
    ) -> impl Future<Output = Result<Option<FenceVerdict>, sqlx::Error>> + Send;

    /// True if the error says that a lock was not granted in time, or was lost to another.
    fn is_busy(error: &sqlx::Error) -> bool;

    /// The database's time, in microseconds since 1970 UTC.
    fn now_us(pool: &Pool<Self>) -> impl Future<Output = Result<i64, sqlx::Error>> + Send;

    /// Removes at most `rows` rows older than `before_us`, oldest first, in one short
    /// transaction; returns how many.
    fn prune(
        pool: &Pool<Self>,
        before_us: i64,
        rows: u32,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;
}

/// Applies the schema of the fence to the database behind `pool`; a repeat changes nothing.
/// A schema newer than this program is refused.
pub async fn migrate<DB: FenceDatabase>(pool: &Pool<DB>) -> Result<(), FenceError> {
    let pool = pool.clone();
    // A task of its own, for the same reason as in `settle_in_task`.
    tokio::spawn(async move { DB::migrate(&pool).await })
        .await
        .unwrap_or(Err(FenceError::Database {
            doing: "migrate",
            source: sqlx::Error::WorkerCrashed,
        }))
}

/// The fence of one database.
#[derive(Debug)]
pub struct Fence<DB: FenceDatabase> {
    pub(crate) pool: Pool<DB>,
    pub(crate) identity: FenceIdentity,
}

/// On whose behalf a fence is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Handfast, by a status check.
    Check,
    /// The SDK, about its own transaction.
    Sdk,
}

impl<DB: FenceDatabase> Fence<DB> {
    /// Reads the identity and refuses a database whose commits are not durable.
    pub async fn open(pool: &Pool<DB>) -> Result<Self, FenceError> {
        Ok(Self {
            pool: pool.clone(),
            identity: identity(pool, Instant::now() + patience(pool)).await?,
        })
    }

    /// The same fence by way of connections of its own, for status checks: two at most, made as
    /// the pool makes its, hooks included.
    pub(crate) async fn for_checks(&self) -> Result<Self, FenceError> {
        let options = self.pool.options().clone();
        let own = options
            .max_connections(CHECK_CONNECTIONS)
            .min_connections(0)
            .acquire_timeout(CHECK_ACQUIRE_WAIT)
            .connect_lazy_with(DB::check_options(&self.pool));
        match Self::open(&own).await {
            Ok(checks) if checks.identity == self.identity => Ok(checks),
            Ok(_) | Err(FenceError::Missing { .. }) => Err(FenceError::Elsewhere),
            Err(error) => Err(error),
        }
    }

    /// Which database this is.
    pub const fn identity(&self) -> FenceIdentity {
        self.identity
    }

    /// Asks what became of a message, and makes ROLLED_BACK true if nothing has: after this
    /// the answer never changes, except from [`Settled::InProgress`].
    ///
    /// A dropped future may leave the row undecided or decided; ask again.
    pub async fn settle(&self, id: Uuid) -> Result<Settled, sqlx::Error> {
        settle_in_task(&self.pool, id, Asker::Sdk).await
    }

    /// Removes rows older than `retention`, a slice at a time; returns how many. A fence must
    /// remember longer than any message of it can stay undecided; see
    /// [`StatusServer::remembers`](crate::StatusServer::remembers).
    pub async fn prune(&self, retention: Duration) -> Result<u64, FenceError> {
        let prune = |source| FenceError::Database {
            doing: "prune",
            source,
        };
        let now_us = self.now_us().await.map_err(prune)?;
        let before_us = now_us.saturating_sub(micros(retention));
        let mut removed = 0;
        loop {
            let pool = self.pool.clone();
            // A task of its own, for the same reason as in `settle_in_task`.
            let slice = tokio::spawn(async move {
                let slice = DB::prune(&pool, before_us, PRUNE_SLICE_ROWS);
                within(patience(&pool), slice).await
            });
            let slice = slice
                .await
                .unwrap_or(Some(Err(sqlx::Error::WorkerCrashed)))
                .unwrap_or(Err(sqlx::Error::PoolTimedOut))
                .map_err(prune)?;
            removed += slice;
            if slice < u64::from(PRUNE_SLICE_ROWS) {
                return Ok(removed);
            }
            // The business goes between two slices.
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn now_us(&self) -> Result<i64, sqlx::Error> {
        within(patience(&self.pool), DB::now_us(&self.pool))
            .await
            .unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }
}

/// How long a connection of the pool and one answer on it may take.
fn patience<DB: Database>(pool: &Pool<DB>) -> Duration {
    pool.options()
        .get_acquire_timeout()
        .saturating_add(SETTLE_TIMEOUT)
}

/// A connection that is outside of any transaction.
pub(crate) async fn acquire<DB: Database>(
    pool: &Pool<DB>,
) -> Result<PoolConnection<DB>, sqlx::Error> {
    loop {
        let mut connection = pool.acquire().await?;
        if !connection.is_in_transaction() {
            return Ok(connection);
        }
        // SQLite has ended a transaction by itself, which sqlx does not notice.
        connection.close_on_drop();
    }
}

/// Reads the identity in a task of its own, which gives its connection up at `ends`.
async fn identity<DB: FenceDatabase>(
    pool: &Pool<DB>,
    ends: Instant,
) -> Result<FenceIdentity, FenceError> {
    let pool = pool.clone();
    let read_until = async move { until(ends, DB::identity(&pool)).await };
    tokio::spawn(read_until)
        .await
        .unwrap_or(Some(Err(read(sqlx::Error::WorkerCrashed))))
        .unwrap_or(Err(read(sqlx::Error::PoolTimedOut)))
}

/// Settles in a task of its own: sqlx leaves a connection inside a transaction if the future
/// of `begin` is dropped.
pub(crate) async fn settle_in_task<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
    asker: Asker,
) -> Result<Settled, sqlx::Error> {
    let pool = pool.clone();
    tokio::spawn(async move { settle(&pool, id, asker).await })
        .await
        .unwrap_or(Err(sqlx::Error::WorkerCrashed))
}

async fn settle<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
    asker: Asker,
) -> Result<Settled, sqlx::Error> {
    match settle_or_give_up(pool, id, asker).await {
        Ok(FenceVerdict::Committed) => Ok(Settled::Committed),
        Ok(FenceVerdict::RolledBack) => Ok(Settled::RolledBack),
        Err(error) if DB::is_busy(&error) || matches!(error, sqlx::Error::PoolTimedOut) => {
            Ok(Settled::InProgress)
        }
        Err(error) => Err(error),
    }
}

async fn settle_or_give_up<DB: FenceDatabase>(
    pool: &Pool<DB>,
    id: Uuid,
    asker: Asker,
) -> Result<FenceVerdict, sqlx::Error> {
    let mut connection = acquire(pool).await?;
    let settled = within(SETTLE_TIMEOUT, async move {
        try_settle::<DB>(&mut connection, id, asker).await
    });
    settled.await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

async fn try_settle<DB: FenceDatabase>(
    connection: &mut DB::Connection,
    id: Uuid,
    asker: Asker,
) -> Result<FenceVerdict, sqlx::Error> {
    let mut tx = connection.begin_with(DB::BEGIN_CHECK).await?;
    DB::insert(&mut tx, id, FenceVerdict::RolledBack).await?;
    // Only a second statement sees what another transaction has just committed.
    let verdict = DB::read(&mut tx, id)
        .await?
        .ok_or(sqlx::Error::RowNotFound)?;
    if asker == Asker::Check {
        hit(Point::PRODUCER_CHECK_BEFORE_COMMIT);
    }
    tx.commit().await?;
    if asker == Asker::Check {
        hit(Point::PRODUCER_CHECK_AFTER_COMMIT);
    }
    Ok(verdict)
}

/// What the table's word means.
fn verdict(word: &str) -> Result<FenceVerdict, sqlx::Error> {
    match word {
        "COMMITTED" => Ok(FenceVerdict::Committed),
        "ROLLED_BACK" => Ok(FenceVerdict::RolledBack),
        other => Err(sqlx::Error::Decode(
            format!("the fence has a verdict `{other}` that this program does not know").into(),
        )),
    }
}

fn read(source: sqlx::Error) -> FenceError {
    FenceError::Database {
        doing: "read",
        source,
    }
}

pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// The identities a producer has read, by pool.
///
/// A pool is recognised by its connect options, which are kept so that their address cannot
/// come to mean another pool.
#[derive(Default)]
pub(crate) struct KnownFences {
    known: Mutex<VecDeque<(Arc<dyn Any + Send + Sync>, FenceIdentity)>>,
}

impl KnownFences {
    /// The identity of the fence behind `pool`, read and checked at first use, until `ends`.
    pub(crate) async fn identity<DB: FenceDatabase>(
        &self,
        pool: &Pool<DB>,
        ends: Instant,
    ) -> Result<FenceIdentity, FenceError> {
        let options: Arc<dyn Any + Send + Sync> = pool.connect_options();
        if let Some(identity) = self.find(&options) {
            return Ok(identity);
        }
        let identity = identity(pool, ends).await?;
        if self.find(&options).is_none() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() == MAX_KNOWN_FENCES {
                known.pop_front();
            }
            known.push_back((options, identity));
        }
        Ok(identity)
    }

    fn find(&self, options: &Arc<dyn Any + Send + Sync>) -> Option<FenceIdentity> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .find(|(known, _)| std::ptr::addr_eq(Arc::as_ptr(known), Arc::as_ptr(options)))
            .map(|(_, identity)| *identity)
    }
}
