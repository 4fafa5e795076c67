//! Opening the file: the lock, what makes it durable, the schema, and void leases.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use handfast_migrations::Owner;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _};

use super::{Readers, SqliteStore, StoreClock, Writer, bodies};
use crate::clock::Clock;
use crate::message::Timestamp;

/// How long a statement waits for another process's lock before the store is unavailable.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// The first bucket is opened with the default span; retention goes on from there.
const FIRST_BUCKET_SPAN: Duration = Duration::from_secs(24 * 3600);

/// Why a store cannot be opened. Each is one line with the way out.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(
        "cannot open the store {path}: another handfast holds its lock; \
         stop that one, or name another file", path = path.display()
    )]
    Locked {
        /// The database file.
        path: PathBuf,
    },
    /// The folder is missing, or the file cannot be written.
    #[error(
        "cannot open the store {path}: {source}; \
         name a file in a folder that exists and can be written", path = path.display()
    )]
    NotWritable {
        /// The database file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What is acknowledged would not survive a power loss.
    #[error(
        "cannot open the store {path}: it would not be durable ({setting} is {found}, \
         {wanted} is needed); put it on a local disk", path = path.display()
    )]
    NotDurable {
        /// The database file.
        path: PathBuf,
        /// The pragma.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it has to be.
        wanted: &'static str,
    },
    /// The schema is newer than this program, or cannot be brought up to date.
    #[error("cannot open the store {path}: {source}", path = path.display())]
    Schema {
        /// The database file.
        path: PathBuf,
        /// Which version was found, or what failed.
        source: handfast_migrations::Error,
    },
    /// Anything else that the database says.
    #[error("cannot open the store {path}: {source}", path = path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// What the database said.
        source: sqlx::Error,
    },
}

impl SqliteStore {
    /// Opens the file, creating it if it is missing, and brings its schema up to date. Refuses
    /// a file that another process holds, that would not be durable, or that a newer program
    /// has written. `seed` feeds jitter and lease tokens.
    pub async fn open(path: &Path, clock: Arc<dyn Clock>, seed: u64) -> Result<Self, OpenError> {
        let database = |source| OpenError::Database {
            path: path.to_owned(),
            source,
        };
        let lock = lock(path)?;
        let options = options(path);
        let (mut db, _) = migrated(path, &options).await?;
        let last: i64 = sqlx::query_scalar("SELECT last_time FROM store")
            .fetch_one(&mut db)
            .await
            .map_err(database)?;
        let clock = Arc::new(StoreClock::start(clock, Timestamp::from_micros(last)));
        void_leases(&mut db, clock.now()).await.map_err(database)?;
        bodies::ensure(&mut db, clock.now(), FIRST_BUCKET_SPAN)
            .await
            .map_err(database)?;
        Ok(Self {
            writer: Writer::start(
                db,
                options.clone(),
                clock.clone(),
                StdRng::seed_from_u64(seed),
            ),
            readers: Readers::new(options),
            clock,
            replica: Mutex::default(),
            _lock: lock,
        })
    }
}

/// Brings the schema of a file up to date, creating the file if it is missing, and returns how
/// many steps that took. Refuses what [`SqliteStore::open`] refuses.
pub async fn migrate(path: &Path) -> Result<usize, OpenError> {
    let _lock = lock(path)?;
    let (db, applied) = migrated(path, &options(path)).await?;
    db.close().await.map_err(|source| OpenError::Database {
        path: path.to_owned(),
        source,
    })?;
    Ok(applied)
}

/// A durable connection to a file whose schema is up to date, and how many steps were missing.
async fn migrated(
    path: &Path,
    options: &SqliteConnectOptions,
) -> Result<(SqliteConnection, usize), OpenError> {
    let mut db = options
        .connect()
        .await
        .map_err(|source| OpenError::Database {
            path: path.to_owned(),
            source,
        })?;
    durable(path, &mut db).await?;
    let applied = Owner::MessageService
        .apply(&mut db)
        .await
        .map_err(|source| OpenError::Schema {
            path: path.to_owned(),
            source,
        })?;
    Ok((db, applied))
}

/// The settings of every connection to a store.
fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(256)
}

/// Takes the exclusive lock: a lock on a file of its own beside the database, because SQLite's
/// own locks come and go with transactions. The system drops it when the process ends.
fn lock(path: &Path) -> Result<File, OpenError> {
    let not_writable = |source| OpenError::NotWritable {
        path: path.to_owned(),
        source,
    };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(PathBuf::from(name))
        .map_err(not_writable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(OpenError::Locked {
                path: path.to_owned(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(not_writable(source)),
    }
    // Tells apart "cannot be written" from everything else that SQLite calls CANTOPEN.
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(not_writable)?;
    Ok(file)
}

async fn durable(path: &Path, db: &mut SqliteConnection) -> Result<(), OpenError> {
    let database = |source| OpenError::Database {
        path: path.to_owned(),
        source,
    };
    let journal: String = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *db)
        .await
        .map_err(database)?;
    if !journal.eq_ignore_ascii_case("wal") {
        return Err(OpenError::NotDurable {
            path: path.to_owned(),
            setting: "journal_mode",
            found: journal,
            wanted: "wal",
        });
    }
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous")
        .fetch_one(&mut *db)
        .await
        .map_err(database)?;
    if synchronous < 2 {
        return Err(OpenError::NotDurable {
            path: path.to_owned(),
            setting: "synchronous",
            found: synchronous.to_string(),
            wanted: "FULL (2)",
        });
    }
    Ok(())
}

/// The lock proves the predecessor dead, so nobody holds a lease and no stream is open: what
/// was on its way is due now. That is nobody's failure and does not count.
async fn void_leases(db: &mut SqliteConnection, now: Timestamp) -> Result<(), sqlx::Error> {
    sqlx::query(
        "-- void leases of deliveries
         UPDATE delivery
            SET state = 'PENDING', due_at = ?, token = NULL, answered_generation = generation
          WHERE state = 'SENT' OR (state = 'PENDING' AND token IS NOT NULL)",
    )
    .bind(now.as_micros())
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "-- void leases of checks
         UPDATE message SET check_at = ?, check_token = NULL
          WHERE state = 'PREPARED' AND check_token IS NOT NULL",
    )
    .bind(now.as_micros())
    .execute(&mut *db)
    .await?;
    Ok(())
}
