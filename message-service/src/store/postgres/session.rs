//! One connection to the database: how it is set up, what its errors mean, when it is replaced.
//!
//! Every statement is a transaction of its own, so a process that freezes holds no lock, and a
//! statement that failed has done nothing and may be repeated. A statement that locks rows does so
//! in the order of their primary key; where one of them stays locked beyond `lock_timeout`, the
//! statement is repeated without the locked ones.
//!
//! A connection on which anything unexpected happened is dropped and opened again. So is one that
//! does not answer in time: what became of its statement is unknown.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Postgres};
use tokio::time::{Instant, timeout};

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a failed opening is not tried again; meanwhile calls are told at once.
const REOPEN_AFTER: Duration = Duration::from_millis(200);
/// A connection that was idle for this long is asked whether it still lives before it is used,
/// since a statement that was sent into nothing has an unknown outcome.
const DOUBTED_AFTER: Duration = Duration::from_secs(1);
/// How long that question may take.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a statement is repeated after a deadlock or a failed serialization.
const MOST_REPEATS: u32 = 10;

/// What a session is for; it decides how long its statements may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Batches of calls: index scans whatever the statistics say, since a plan that was made for
    /// a small table stays in use while the table grows. For the same reason these statements
    /// look rows up with `id = ANY (ARRAY[…])` and keep other conditions under `IS TRUE`: joined
    /// by plain equality a small table was read as a whole for each batch, or along an index
    /// that holds the undecided messages of a producer.
    Write,
    /// Topology: rare, in a transaction of its own over rows that nobody else locks.
    Apply,
    /// Body buckets: never waits for a lock, because everybody else would wait behind it.
    Retire,
    /// Reads of people and passes.
    Read,
}

impl Use {
    const fn statement_timeout(self) -> Duration {
        Duration::from_secs(match self {
            Self::Write => 4,
            Self::Apply | Self::Retire | Self::Read => 15,
        })
    }

    const fn lock_timeout(self) -> Duration {
        Duration::from_millis(match self {
            Self::Write | Self::Apply | Self::Read => 1_000,
            Self::Retire => 200,
        })
    }

    /// Longer than the server's own limit, which ends most statements: beyond it nobody answers.
    fn deadline(self) -> Duration {
        self.statement_timeout() + Duration::from_secs(2)
    }

    fn settings(self) -> String {
        let planner = match self {
            Self::Write => format!("{LOOK_UP} SET enable_material = off;"),
            Self::Retire => format!("{LOOK_UP} {PLAN_EACH}"),
            Self::Apply | Self::Read => PLAN_EACH.to_owned(),
        };
        format!(
            "SET statement_timeout = {}; SET lock_timeout = {}; \
             SET idle_in_transaction_session_timeout = '5s'; SET synchronous_commit = on; \
             SET default_transaction_isolation = 'read committed'; SET TimeZone = 'UTC'; \
             SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; \
             SET tcp_keepalives_count = 3; SET jit = off; {planner}",
            self.statement_timeout().as_millis(),
            self.lock_timeout().as_millis(),
        )
    }
}

/// Rows are looked up, not searched for.
const LOOK_UP: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; \
                       SET enable_hashjoin = off; SET enable_mergejoin = off; \
                       SET work_mem = '16MB';";
/// A plan for each execution, with the sizes of that moment.
const PLAN_EACH: &str = "SET plan_cache_mode = force_custom_plan;";

/// A statement with its arguments.
pub(super) type Bound = Query<'static, Postgres, PgArguments>;

/// What helps against an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Deadlock or serialization: the same again.
    Repeat,
    /// What one caller brought cannot be written: the others without it.
    Poison,
    /// Somebody holds a row for too long: the others without it.
    Locked,
    /// The table is not there: buckets come and go.
    NoSuchTable,
    /// The database cannot do anything for anybody now.
    Unavailable,
}

pub(super) fn trouble(error: &sqlx::Error) -> Trouble {
    match error {
        sqlx::Error::Database(cause) => {
            let code = cause.code();
            let code = code.as_deref().unwrap_or_default();
            match (code, code.get(..2).unwrap_or_default()) {
                ("55P03", _) => Trouble::Locked,
                ("42P01", _) => Trouble::NoSuchTable,
                // Whether it was committed is unknown: nothing is repeated blindly.
                ("40003", _) => Trouble::Unavailable,
                (_, "40") => Trouble::Repeat,
                (_, "22" | "23") => Trouble::Poison,
                _ => Trouble::Unavailable,
            }
        }
        sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::Decode(_)
        | sqlx::Error::Encode(_) => Trouble::Poison,
        _ => Trouble::Unavailable,
    }
}

/// How often statements were repeated.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    /// All together.
    pub(super) total: AtomicU64,
    /// The most of one statement.
    pub(super) most: AtomicU64,
}

/// A connection that opens itself again.
pub(super) struct Session {
    options: Arc<PgConnectOptions>,
    used: Use,
    db: Option<PgConnection>,
    used_at: Instant,
    /// Until when a failed opening is not repeated, and what it said.
    closed_until: Option<(Instant, String)>,
    repeats: Arc<Repeats>,
    /// Whether the next statement waits for locked rows. Once one has waited in vain, the rest
    /// of a batch does not: those who share it have waited long enough.
    patient: bool,
}

impl Session {
    /// Nothing is opened before the first statement.
    pub(super) fn new(options: Arc<PgConnectOptions>, used: Use, repeats: Arc<Repeats>) -> Self {
        Self {
            options,
            used,
            db: None,
            used_at: Instant::now(),
            closed_until: None,
            repeats,
            patient: true,
        }
    }

    /// A new batch begins.
    pub(super) fn be_patient(&mut self) {
        self.patient = true;
    }

    /// Runs one statement as a transaction of its own and returns its rows.
    pub(super) async fn fetch(
        &mut self,
        sql: &str,
        bind: impl Fn(Bound) -> Bound,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut repeats = 0;
        loop {
            let text = if self.patient {
                sql.to_owned()
            } else {
                sql.replace(WAITS, WAITS_NOT)
            };
            let error = match self.once(bind(sqlx::query(AssertSqlSafe(text)))).await {
                Ok(rows) => return Ok(rows),
                Err(error) => error,
            };
            match trouble(&error) {
                Trouble::Repeat if repeats < MOST_REPEATS => {
                    repeats += 1;
                    self.repeats.total.fetch_add(1, Ordering::Relaxed);
                    self.repeats
                        .most
                        .fetch_max(repeats.into(), Ordering::Relaxed);
                }
                Trouble::Locked if self.patient && sql.contains(WAITS) => self.patient = false,
                Trouble::Repeat
                | Trouble::Poison
                | Trouble::Locked
                | Trouble::NoSuchTable
                | Trouble::Unavailable => return Err(error),
            }
        }
    }

    async fn once(&mut self, query: Bound) -> Result<Vec<PgRow>, sqlx::Error> {
        let deadline = self.used.deadline();
        let db = self.open().await?;
        let result = timeout(deadline, query.fetch_all(db)).await;
        self.after(result)
    }

    /// Runs statements without arguments, sent together: one transaction of its own too.
    pub(super) async fn run(&mut self, sql: String) -> Result<(), sqlx::Error> {
        let deadline = self.used.deadline();
        let db = self.open().await?;
        let result = timeout(deadline, sqlx::raw_sql(AssertSqlSafe(sql)).execute(db)).await;
        self.after(result).map(|_| ())
    }

    /// Does work that needs more than one statement; unless all of it went well, the connection
    /// goes, and with it what was begun.
    pub(super) async fn with<T, F>(&mut self, work: F) -> Result<T, sqlx::Error>
    where
        F: for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>>,
    {
        let deadline = self.used.deadline();
        let db = self.open().await?;
        let result = timeout(deadline, work(db)).await;
        let result = self.after(result);
        if result.is_err() {
            self.db = None;
        }
        result
    }

    /// Keeps the connection only if it is known to be in order.
    fn after<T>(
        &mut self,
        result: Result<Result<T, sqlx::Error>, tokio::time::error::Elapsed>,
    ) -> Result<T, sqlx::Error> {
        self.used_at = Instant::now();
        let error = match result {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(_) => timed_out("the database did not answer in time"),
        };
        if trouble(&error) == Trouble::Unavailable {
            self.db = None;
        }
        Err(error)
    }

    async fn open(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let db = match self.db.take() {
            Some(db) if self.used_at.elapsed() < DOUBTED_AFTER => Some(db),
            Some(mut db) => match timeout(PING_TIMEOUT, db.ping()).await {
                Ok(Ok(())) => Some(db),
                Ok(Err(_)) | Err(_) => None,
            },
            None => None,
        };
        let db = match db {
            Some(db) => db,
            None => self.connect().await?,
        };
        self.used_at = Instant::now();
        Ok(self.db.insert(db))
    }

    async fn connect(&mut self) -> Result<PgConnection, sqlx::Error> {
        if let Some((until, said)) = &self.closed_until
            && Instant::now() < *until
        {
            return Err(sqlx::Error::Io(std::io::Error::other(said.clone())));
        }
        let opening = connect(&self.options, self.used);
        let result = timeout(CONNECT_TIMEOUT, opening)
            .await
            .unwrap_or_else(|_| Err(timed_out("the database does not take connections in time")));
        self.closed_until = match &result {
            Ok(_) => None,
            Err(error) => Some((Instant::now() + REOPEN_AFTER, error.to_string())),
        };
        result
    }

    /// Says good-bye to the server.
    pub(super) async fn close(&mut self) {
        if let Some(db) = self.db.take() {
            // Nothing is under way, so nothing is lost if the server does not hear it.
            drop(timeout(PING_TIMEOUT, db.close()).await);
        }
    }
}

/// What a statement says behind `FOR UPDATE OF …`, so that it can be repeated without the rows
/// that stay locked.
const WAITS: &str = "/* waits */";
const WAITS_NOT: &str = "SKIP LOCKED";

/// Opens a connection with the settings of its use.
pub(super) async fn connect(
    options: &PgConnectOptions,
    used: Use,
) -> Result<PgConnection, sqlx::Error> {
    let mut db = options.connect().await?;
    sqlx::raw_sql(AssertSqlSafe(used.settings()))
        .execute(&mut db)
        .await?;
    Ok(db)
}

fn timed_out(what: &'static str) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, what))
}
