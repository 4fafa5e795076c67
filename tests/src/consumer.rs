//! A consumer with a handler of the test's own: the SDK, and a database of this world.

use std::time::Duration;

use handfast_consumer::{
    BatchHandler, Consumer, Error, GuardConnection, InboxDatabase, Report, Source, Tx, handfast,
    rabbitmq,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Postgres, Sqlite};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::database::Database;
use crate::home::Engines;
use crate::in_either;
use crate::world::World;

const STOP: Duration = Duration::from_secs(10);
/// Connections of a database of the test's own.
const CONNECTIONS: u32 = 6;

/// A kind of database that a handler of the test's own writes to.
pub trait Own: InboxDatabase<Connection: GuardConnection> {
    /// Runs a statement with two parameters, `$1` bytes and `$2` text.
    fn write(
        tx: &mut Tx<Self>,
        sql: &'static str,
        id: Uuid,
        what: &str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

impl Own for Sqlite {
    async fn write(
        tx: &mut Tx<Self>,
        sql: &'static str,
        id: Uuid,
        what: &str,
    ) -> Result<(), sqlx::Error> {
        let query = sqlx::query(sql).bind(id.as_bytes().to_vec()).bind(what);
        query.execute(tx).await.map(drop)
    }
}

impl Own for Postgres {
    async fn write(
        tx: &mut Tx<Self>,
        sql: &'static str,
        id: Uuid,
        what: &str,
    ) -> Result<(), sqlx::Error> {
        let query = sqlx::query(sql).bind(id.as_bytes().to_vec()).bind(what);
        query.execute(tx).await.map(drop)
    }
}

/// The tables of a database of the test's own, in the words of either kind. Making them again
/// changes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    /// In SQLite's words.
    pub sqlite: &'static str,
    /// In PostgreSQL's words.
    pub postgres: &'static str,
}

impl Schema {
    /// What both understand.
    pub const fn both(sql: &'static str) -> Self {
        Self {
            sqlite: sql,
            postgres: sql,
        }
    }
}

/// A consumer that runs; dropped, it is gone without a word, as after a crash.
#[derive(Debug)]
pub struct Consuming {
    task: JoinHandle<Result<Report, Error>>,
    shutdown: CancellationToken,
}

impl Consuming {
    /// Stops it in good order and returns its numbers.
    pub async fn stop(mut self) -> Report {
        self.shutdown.cancel();
        tokio::time::timeout(STOP, &mut self.task)
            .await
            .unwrap_or_else(|_| panic!("the consumer did not stop within {STOP:?}"))
            .expect("the consumer did not panic")
            .expect("the consumer ended well")
    }
}

impl Drop for Consuming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    /// A database of the test's own in this world, made if it is not there.
    pub async fn own_database(&self, name: &str, schema: Schema) -> Database {
        self.own_database_with(name, schema, CONNECTIONS).await
    }

    /// The same with so many connections.
    pub async fn own_database_with(
        &self,
        name: &str,
        schema: Schema,
        connections: u32,
    ) -> Database {
        self.make_database(name).await;
        let address = self.database_address(name);
        let database = match self.engines() {
            Engines::Embedded => {
                let options = SqliteConnectOptions::new()
                    .filename(&address)
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .busy_timeout(Duration::from_secs(5));
                let pool = SqlitePoolOptions::new().max_connections(connections);
                pool.connect_with(options).await.map(Database::Sqlite)
            }
            Engines::Production => {
                let pool = PgPoolOptions::new().max_connections(connections);
                pool.connect(&address).await.map(Database::Postgres)
            }
        };
        let database = database.unwrap_or_else(|error| panic!("cannot open {name}: {error}"));
        let sql = match database {
            Database::Sqlite(_) => schema.sqlite,
            Database::Postgres(_) => schema.postgres,
        };
        database.run(sql).await;
        database
    }

    /// Where consumers take their deliveries from.
    pub fn source(&self) -> Source {
        match self.engines() {
            Engines::Embedded => handfast(self.service_url()),
            Engines::Production => {
                let (url, deployment) = self.rabbitmq();
                rabbitmq(url).deployment(deployment).into()
            }
        }
    }

    /// Consumes with this handler; its effects and the inbox go to `database`.
    pub async fn consume(
        &self,
        topic: &str,
        subscription: &str,
        database: &Database,
        handler: impl BatchHandler<Sqlite> + BatchHandler<Postgres>,
    ) -> Consuming {
        let consumer = Consumer::connect(self.source()).await.expect("an address");
        let subscription = consumer.subscription(topic, subscription);
        let shutdown = CancellationToken::new();
        let task = in_either!(database, pool => {
            let subscriber = subscription.inbox(pool.clone());
            tokio::spawn(subscriber.run_batch(handler, shutdown.clone()))
        });
        Consuming { task, shutdown }
    }
}
