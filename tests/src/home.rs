//! Where a world keeps its databases and its queues.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use handfast_servers::{Postgres, RabbitMq};
use lapin::options::QueueDeleteOptions;
use lapin::{Connection, ConnectionProperties};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tempfile::TempDir;
use tokio::time::timeout;
use uuid::Uuid;

use crate::database::{Database, look_at};

/// Cleaning up takes this long at most, or the test fails.
const CLEAN: Duration = Duration::from_secs(30);
/// An end that was not confirmed by then is left to happen by itself.
const HANG_UP: Duration = Duration::from_secs(2);
const SERVICE: &str = "service";

/// What keeps messages and what carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engines {
    /// SQLite files, and deliveries on streams of the service.
    Embedded,
    /// PostgreSQL and RabbitMQ.
    Production,
}

/// Servers of a world's own, for stories that break them. What is not there is taken from the
/// environment.
#[derive(Debug, Default)]
pub struct Servers {
    /// A PostgreSQL that nobody else uses.
    pub postgres: Option<Postgres>,
    /// A RabbitMQ that nobody else uses.
    pub rabbitmq: Option<RabbitMq>,
}

impl Servers {
    /// A RabbitMQ to be broken.
    pub fn own_rabbitmq() -> Self {
        Self {
            rabbitmq: Some(RabbitMq::start().unwrap_or_else(|error| panic!("{error}"))),
            ..Self::default()
        }
    }

    /// A PostgreSQL to be broken.
    pub fn own_postgres() -> Self {
        Self {
            postgres: Some(Postgres::start().unwrap_or_else(|error| panic!("{error}"))),
            ..Self::default()
        }
    }
}

/// A folder, and with the production engines names on two servers. Dropped, all of it goes.
#[derive(Debug)]
pub(crate) struct Home {
    production: Option<Production>,
    /// Where the service keeps its database, if not in the folder.
    service_file: Option<PathBuf>,
    /// How the service reaches RabbitMQ, if not as everybody does.
    service_amqp: Option<String>,
    folder: TempDir,
}

#[derive(Debug)]
pub(crate) struct Production {
    /// Any database on the server.
    postgres: String,
    pub(crate) amqp: String,
    /// What every name of this world begins with.
    name: String,
    pools: Mutex<BTreeMap<String, PgPool>>,
    queues: Mutex<BTreeSet<String>>,
    /// Own servers go as a whole.
    clean: Clean,
}

#[derive(Clone, Copy, Debug)]
struct Clean {
    postgres: bool,
    rabbitmq: bool,
}

impl Home {
    pub(crate) fn new(engines: Engines, servers: &Servers) -> Self {
        Self {
            production: (engines == Engines::Production).then(|| Production::new(servers)),
            service_file: None,
            service_amqp: None,
            folder: TempDir::with_prefix("handfast-test-").expect("a temporary folder"),
        }
    }

    pub(crate) const fn engines(&self) -> Engines {
        match self.production {
            Some(_) => Engines::Production,
            None => Engines::Embedded,
        }
    }

    pub(crate) const fn production(&self) -> Option<&Production> {
        self.production.as_ref()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    pub(crate) fn keep_service_in(&mut self, file: PathBuf) {
        assert_eq!(self.engines(), Engines::Embedded, "a file is not a server");
        self.service_file = Some(file);
    }

    pub(crate) fn connect_service_to(&mut self, amqp: String) {
        self.service_amqp = Some(amqp);
    }

    /// Where the service finds RabbitMQ.
    pub(crate) fn service_amqp(&self) -> Option<&str> {
        let shared = self.production.as_ref().map(|shared| shared.amqp.as_str());
        self.service_amqp.as_deref().or(shared)
    }

    pub(crate) fn database_file(&self, name: &str) -> PathBuf {
        match &self.service_file {
            Some(file) if name == SERVICE => file.clone(),
            _ => self.file(&format!("{name}.db")),
        }
    }

    /// Where the database of this name is, as programs are told.
    pub(crate) fn address(&self, name: &str) -> String {
        match &self.production {
            Some(production) => production.database_url(name),
            None => self.database_file(name).display().to_string(),
        }
    }

    /// Makes the database of this name if it is not there; files make themselves.
    pub(crate) async fn make(&self, name: &str) {
        if let Some(production) = &self.production {
            production.make(name).await;
        }
    }

    /// The database of this name, if it was made.
    pub(crate) async fn open(&self, name: &str) -> Option<Database> {
        match &self.production {
            Some(production) => {
                let pools = production.pools.lock().unwrap();
                pools.get(name).cloned().map(Database::Postgres)
            }
            None => {
                let file = self.database_file(name);
                let there = file.exists();
                if there {
                    Some(look_at(&file).await)
                } else {
                    None
                }
            }
        }
    }
}

impl Production {
    fn new(servers: &Servers) -> Self {
        let own = &servers.postgres;
        let postgres = own.as_ref().map(Postgres::admin_url);
        let amqp = servers.rabbitmq.as_ref().map(RabbitMq::url);
        let name = Uuid::new_v4().simple().to_string();
        Self {
            clean: Clean {
                postgres: postgres.is_none(),
                rabbitmq: amqp.is_none(),
            },
            postgres: postgres.unwrap_or_else(|| named("HANDFAST_TEST_POSTGRES")),
            amqp: amqp.unwrap_or_else(|| named("HANDFAST_TEST_AMQP")),
            name: name[..12].to_owned(),
            pools: Mutex::default(),
            queues: Mutex::default(),
        }
    }

    /// What every name of this world in RabbitMQ begins with.
    pub(crate) fn deployment(&self) -> String {
        format!("test-{}", self.name)
    }

    /// The queue of a subscription; it is deleted with the world.
    pub(crate) fn queue(&self, subscription: &str) -> String {
        let queue = format!("{}.{subscription}", self.deployment());
        self.queues.lock().unwrap().insert(queue.clone());
        queue
    }

    fn database_name(&self, name: &str) -> String {
        format!("handfast_test_{}_{}", self.name, name.replace('-', "_"))
    }

    fn database_url(&self, name: &str) -> String {
        let (url, query) = match self.postgres.split_once('?') {
            Some((url, query)) => (url, format!("?{query}")),
            None => (self.postgres.as_str(), String::new()),
        };
        let (server, _) = url.rsplit_once('/').expect("a URL of a database");
        format!("{server}/{}{query}", self.database_name(name))
    }

    async fn make(&self, name: &str) {
        if self.pools.lock().unwrap().contains_key(name) {
            return;
        }
        let sql = format!("CREATE DATABASE {}", self.database_name(name));
        administer(&self.postgres, vec![sql]).await;
        let options: PgConnectOptions = self.database_url(name).parse().expect("a URL");
        let pool = PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy_with(options);
        self.pools.lock().unwrap().insert(name.to_owned(), pool);
    }

    async fn drop_databases(&self) {
        let pools = std::mem::take(&mut *self.pools.lock().unwrap());
        let drop =
            |name: &String| format!("DROP DATABASE {} WITH (FORCE)", self.database_name(name));
        administer(&self.postgres, pools.keys().map(drop).collect()).await;
    }

    async fn delete_queues(&self) {
        self.queue("acknowledge");
        self.queue("mark");
        let connection = Connection::connect(&self.amqp, ConnectionProperties::default())
            .await
            .expect("RabbitMQ is there");
        let queues = self.queues.lock().unwrap().clone();
        for queue in queues {
            let channel = connection.create_channel().await.expect("a channel");
            // A queue that is not there is deleted, too.
            let deleted =
                channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
            deleted.await.expect("a queue is deleted");
            channel.close(200, "done".into()).await.expect("an end");
        }
        hang_up(connection).await;
    }
}

/// Closes a connection to RabbitMQ.
pub(crate) async fn hang_up(connection: Connection) {
    // lapin may end its own loop before it says that RabbitMQ has closed; then nobody answers.
    let _ = timeout(HANG_UP, connection.close(200, "done".into())).await;
}

impl Drop for Production {
    fn drop(&mut self) {
        std::thread::scope(|scope| {
            // A thread of its own, because a test's runtime cannot be waited for inside of it.
            let cleaning = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a runtime");
                let clean = async {
                    if self.clean.postgres {
                        self.drop_databases().await;
                    }
                    if self.clean.rabbitmq {
                        self.delete_queues().await;
                    }
                };
                runtime
                    .block_on(async { tokio::time::timeout(CLEAN, clean).await })
                    .expect("cleaning up in time");
            });
            // A test that has failed says more than what it leaves.
            let cleaned = cleaning.join();
            assert!(cleaned.is_ok() || std::thread::panicking());
        });
    }
}

/// The server that the environment names.
fn named(variable: &str) -> String {
    std::env::var(variable)
        .ok()
        .filter(|url| !url.is_empty())
        .unwrap_or_else(|| {
            panic!("{variable} is not set; run `cargo xtask test`, or name a server")
        })
}

async fn administer(server: &str, statements: Vec<String>) {
    let options: PgConnectOptions = server.parse().expect("a URL of PostgreSQL");
    let mut connection = options.connect().await.expect("PostgreSQL is there");
    for sql in statements {
        let ran = sqlx::raw_sql(AssertSqlSafe(sql.clone()));
        ran.execute(&mut connection)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    // It is of no more use either way.
    let _ = connection.close().await;
}
