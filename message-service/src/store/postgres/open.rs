//! Opening the store: what makes it durable, the schema, the first buckets.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use handfast_migrations::Owner;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{Connection as _, Row as _};
use tokio::time::timeout;
use uuid::Uuid;

use super::answers::{Acknowledge, Recover, TakeBack};
use super::bodies::{self, Bodies};
use super::checks::{ClaimChecks, SettleChecks};
use super::decisions::Decide;
use super::deliveries::{Claim, MarkSent};
use super::lanes::Lane;
use super::marks::Marks;
use super::messages::{Prepare, Publish};
use super::readers::Readers;
use super::replicas::Announce;
use super::retire::Retire;
use super::session::{Repeats, Session, Trouble, Use, connect, trouble};
use super::time::StoreClock;
use super::topology::Apply;
use super::turns::Turns;
use super::{Lanes, PostgresStore};
use crate::clock::Clock;

/// How long the server may take for the first connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The first bucket is opened with the default span; retention goes on from there.
const FIRST_BUCKET_SPAN: Duration = Duration::from_secs(24 * 3600);
/// The oldest server whose SQL this store speaks, as the server counts.
const OLDEST_VERSION: i32 = 140_000;
/// How often the first buckets are tried to be made; each try waits 200 ms for a lock.
const TRIES: u32 = 50;
/// How often the estimate of the database's clock is corrected.
const CLOCK_EVERY: Duration = Duration::from_secs(5);
/// Connections that read, unless told otherwise.
const READERS: usize = 4;
/// Connections that read for people, beside those.
const PEOPLE: usize = 2;
/// Connections that read bodies, for two flights at a time.
const BODIES: usize = 2;

/// Which database, and how many connections may read from it. Shown without its password.
#[derive(Clone)]
pub struct Address {
    // Shared, because it is part of every error and large.
    options: Arc<PgConnectOptions>,
    readers: usize,
}

impl Address {
    /// With this many connections that read at a time, at least one, and at most two more that
    /// read for people. Each kind of write has one more. All are opened when first used.
    #[must_use]
    pub fn readers(mut self, readers: usize) -> Self {
        self.readers = readers.max(1);
        self
    }
}

impl FromStr for Address {
    type Err = OpenError;

    /// Reads a URL `postgres://user:password@host:port/database`.
    fn from_str(url: &str) -> Result<Self, OpenError> {
        url.parse()
            .map(|options: PgConnectOptions| options.into())
            .map_err(|source| OpenError::Address { source })
    }
}

impl From<PgConnectOptions> for Address {
    fn from(options: PgConnectOptions) -> Self {
        let options = options
            .application_name("handfast")
            .statement_cache_capacity(256);
        Self {
            options: Arc::new(options),
            readers: READERS,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = &self.options;
        let database = options.get_database().unwrap_or(options.get_username());
        match options.get_socket() {
            Some(socket) => write!(f, "postgres://{}/{database}", socket.display()),
            None => write!(
                f,
                "postgres://{}:{}/{database}",
                options.get_host(),
                options.get_port()
            ),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// Why a store cannot be opened. Each is one line with the way out, and none has the password.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL cannot be read. It is not repeated, because it may carry a password.
    #[error(
        "cannot read the address of the store: {source}; \
         use postgres://user:password@host:port/database"
    )]
    Address {
        /// What is wrong with it.
        source: sqlx::Error,
    },
    /// The server is not there, or lets nobody in.
    #[error("cannot open the store {address}: {source}; see that the server runs and lets us in")]
    NotThere {
        /// Which database.
        address: Address,
        /// What the server or the system said.
        source: sqlx::Error,
    },
    /// It is not a database that this store can live in.
    #[error("cannot open the store {address}: {what}")]
    Unsuitable {
        /// Which database.
        address: Address,
        /// What is wrong, and the way out.
        what: String,
    },
    /// What is acknowledged would not survive a power loss.
    #[error(
        "cannot open the store {address}: it would not be durable ({setting} is {found}, \
         {wanted} is needed); change that in the server's configuration"
    )]
    NotDurable {
        /// Which database.
        address: Address,
        /// The setting.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it has to be.
        wanted: &'static str,
    },
    /// The schema is newer than this program, or cannot be brought up to date.
    #[error("cannot open the store {address}: {source}")]
    Schema {
        /// Which database.
        address: Address,
        /// Which version was found, or what failed.
        source: handfast_migrations::Error,
    },
    /// Anything else that the database says.
    #[error("cannot open the store {address}: {source}")]
    Database {
        /// Which database.
        address: Address,
        /// What the database said.
        source: sqlx::Error,
    },
}

impl PostgresStore {
    /// Opens the store in this database and brings its schema up to date. Refuses a server that
    /// is too old, not durable, read-only or not there, and a schema that a newer program has
    /// written. `clock` says how much time passed between two looks at the database's own;
    /// `seed` feeds jitter and lease tokens, and differs from process to process.
    pub async fn open(
        address: impl Into<Address>,
        clock: Arc<dyn Clock>,
        seed: u64,
    ) -> Result<Self, OpenError> {
        let address = address.into();
        let mut db = suitable(&address).await?;
        migrated(&address, &mut db).await?;
        let database = |source| OpenError::Database {
            address: address.clone(),
            source,
        };
        let identity: Uuid = sqlx::query_scalar("SELECT identity FROM store")
            .fetch_one(&mut db)
            .await
            .map_err(database)?;
        // Nothing is lost if the server does not hear the good-bye.
        drop(timeout(CONNECT_TIMEOUT, db.close()).await);
        let store = Self::start(&address, clock, seed, identity);
        let mut session = store.session(Use::Retire);
        let mut tries = 1;
        // Another process may be making the same ones at this moment.
        while let Err(error) = bodies::open_ahead(&mut session, FIRST_BUCKET_SPAN).await {
            if trouble(&error) != Trouble::Locked || tries >= TRIES {
                return Err(database(error));
            }
            tries += 1;
        }
        store.clock.refresh(&mut session).await.map_err(database)?;
        session.close().await;
        Ok(store)
    }

    fn start(address: &Address, clock: Arc<dyn Clock>, seed: u64, identity: Uuid) -> Self {
        let options = Arc::clone(&address.options);
        let repeats = Arc::new(Repeats::default());
        let session = |used| Session::new(Arc::clone(&options), used, Arc::clone(&repeats));
        let written = Arc::new(Bodies::default());
        let marks = Arc::new(Marks::default());
        let clock = Arc::new(StoreClock::new(clock));
        let mut seeds = StdRng::seed_from_u64(seed);
        let mut rng = || StdRng::from_rng(&mut seeds);
        let write = Use::Write;
        let lanes = Lanes {
            apply: Lane::start(Apply, session(Use::Apply), &marks),
            prepare: Lane::start(Prepare(Arc::clone(&written)), session(write), &marks),
            publish: Lane::start(Publish(Arc::clone(&written), rng()), session(write), &marks),
            decide: Lane::start(Decide(rng()), session(write), &marks),
            claim_checks: Lane::start(ClaimChecks(rng()), session(write), &marks),
            settle_checks: Lane::start(SettleChecks(rng()), session(write), &marks),
            claim: Lane::start(
                Claim::new(rng(), Arc::clone(&marks)),
                session(write),
                &marks,
            ),
            sent: Lane::start(MarkSent, session(write), &marks),
            acknowledge: Lane::start(Acknowledge(rng()), session(write), &marks),
            take_back: Lane::start(TakeBack(rng()), session(write), &marks),
            recover: Lane::start(
                Recover::new(rng(), Arc::clone(&clock)),
                session(write),
                &marks,
            ),
            retire: Lane::start(Retire::default(), session(Use::Retire), &marks),
            announce: Lane::start(Announce, session(write), &marks),
            turns: Lane::start(Turns, session(write), &marks),
        };
        let readers = |number| Readers::new(Arc::clone(&options), number, Arc::clone(&repeats));
        let people = readers(address.readers.min(PEOPLE));
        let bodies = readers(BODIES);
        let readers = readers(address.readers);
        let watch = tokio::spawn(watch(Arc::clone(&clock), session(Use::Read)));
        Self {
            lanes,
            written,
            readers,
            bodies,
            people,
            marks,
            clock,
            identity,
            options,
            repeats,
            watch,
        }
    }

    fn session(&self, used: Use) -> Session {
        Session::new(Arc::clone(&self.options), used, Arc::clone(&self.repeats))
    }
}

/// Corrects the estimate of the database's clock, until the store is closed.
async fn watch(clock: Arc<StoreClock>, mut session: Session) {
    loop {
        tokio::time::sleep(CLOCK_EVERY).await;
        if let Err(error) = clock.refresh(&mut session).await {
            // The lanes say so to everybody who calls.
            tracing::debug!(%error, "cannot ask the database for the time");
        }
    }
}

/// Brings the schema in a database up to date and returns how many steps that took. Refuses what
/// [`PostgresStore::open`] refuses.
pub async fn migrate(address: impl Into<Address>) -> Result<usize, OpenError> {
    let address = address.into();
    let mut db = suitable(&address).await?;
    let applied = migrated(&address, &mut db).await?;
    drop(timeout(CONNECT_TIMEOUT, db.close()).await);
    Ok(applied)
}

async fn migrated(address: &Address, db: &mut PgConnection) -> Result<usize, OpenError> {
    Owner::MessageService
        .apply(db)
        .await
        .map_err(|source| OpenError::Schema {
            address: address.clone(),
            source,
        })
}

/// A connection to a database that this store can live in.
async fn suitable(address: &Address) -> Result<PgConnection, OpenError> {
    let opening = connect(&address.options, Use::Apply);
    let mut db = timeout(CONNECT_TIMEOUT, opening)
        .await
        .unwrap_or_else(|_| {
            let text = "the server does not answer in time";
            Err(sqlx::Error::Io(std::io::Error::other(text)))
        })
        .map_err(|source| OpenError::NotThere {
            address: address.clone(),
            source,
        })?;
    let row = sqlx::query(
        "-- what kind of server
         SELECT current_setting('server_version_num')::int AS version,
                current_setting('server_version') AS version_text,
                current_setting('server_encoding') AS encoding,
                pg_is_in_recovery() AS standby,
                current_setting('transaction_read_only') AS read_only,
                current_setting('fsync') AS fsync,
                current_setting('full_page_writes') AS full_page_writes,
                current_setting('synchronous_commit') AS synchronous_commit",
    )
    .fetch_one(&mut db)
    .await
    .map_err(|source| OpenError::Database {
        address: address.clone(),
        source,
    })?;
    let text = |column: &str| -> Result<String, OpenError> {
        row.try_get(column).map_err(|source| OpenError::Database {
            address: address.clone(),
            source,
        })
    };
    let unsuitable = |what: String| {
        Err(OpenError::Unsuitable {
            address: address.clone(),
            what,
        })
    };
    let version: i32 = row.try_get("version").unwrap_or_default();
    if version < OLDEST_VERSION {
        let found = text("version_text")?;
        return unsuitable(format!("PostgreSQL {found} is too old; use 14 or later"));
    }
    if row.try_get("standby").unwrap_or(false) {
        return unsuitable("it is a standby; name the primary".to_owned());
    }
    if text("read_only")? == "on" {
        let what = "it is read-only (default_transaction_read_only); let it be written";
        return unsuitable(what.to_owned());
    }
    let encoding = text("encoding")?;
    if encoding != "UTF8" {
        let what = format!("its encoding is {encoding}; create it with ENCODING 'UTF8'");
        return unsuitable(what);
    }
    // The session has set synchronous_commit itself, so anything else cannot be overridden.
    for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
        let found = text(setting)?;
        if found != "on" {
            return Err(OpenError::NotDurable {
                address: address.clone(),
                setting,
                found,
                wanted: "on",
            });
        }
    }
    Ok(db)
}
