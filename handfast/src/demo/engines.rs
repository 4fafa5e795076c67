//! On which engines a run works: files of its own, or databases and names of its own on servers
//! that somebody else runs. Nothing that was there before is touched.

use std::path::Path;
use std::str::FromStr as _;
use std::time::Duration;

use lapin::options::QueueDeleteOptions;
use lapin::{Connection, ConnectionProperties};
use rand::Rng;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tokio::time::timeout;

use super::Error;
use super::plan::Role;
use super::proxy::Proxy;

/// How long the servers are waited for, at the beginning and at the end.
const SERVERS_WITHIN: Duration = Duration::from_secs(10);

/// The timers of a run, shortened for a demonstration, in milliseconds; the design's rules
/// between them hold as with the defaults: publisher confirm < handler < lease < resend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timers {
    /// After a prepare, the first check.
    pub(crate) check_after_ms: u64,
    /// How long a send may take.
    pub(crate) publisher_confirm_ms: u64,
    /// How long a consumer's transaction may take.
    pub(crate) handler_ms: u64,
    /// How long a claim belongs to its claimer.
    pub(crate) lease_ms: u64,
    /// When silence is looked at.
    pub(crate) resend_after_ms: u64,
    /// Every wait between two attempts.
    pub(crate) step_ms: u64,
    /// How much later than a lost delivery an answered one was sent.
    pub(crate) passed_by_ms: u64,
    /// How long after a start nothing is resent.
    pub(crate) start_grace_ms: u64,
}

const EMBEDDED: Timers = Timers {
    check_after_ms: 500,
    publisher_confirm_ms: 1_000,
    handler_ms: 1_500,
    lease_ms: 2_000,
    resend_after_ms: 3_000,
    step_ms: 3_000,
    passed_by_ms: 1_000,
    start_grace_ms: 1_000,
};

/// Servers on a small machine may take a moment for their disk.
const PRODUCTION: Timers = Timers {
    publisher_confirm_ms: 2_000,
    handler_ms: 2_500,
    lease_ms: 4_000,
    resend_after_ms: 5_000,
    ..EMBEDDED
};

/// What was asked for.
#[derive(Clone)]
pub(crate) enum Wanted {
    /// SQLite files, and no broker.
    Embedded,
    /// A PostgreSQL server, by the URL of a database on it, and a RabbitMQ.
    Production {
        /// Connects to the server; may create databases.
        postgres: Box<PgConnectOptions>,
        /// The URL, to be handed on with other databases.
        postgres_url: String,
        /// Where RabbitMQ is.
        broker: String,
    },
}

impl Wanted {
    /// Reads a pair of URLs. The error is one line that repeats neither.
    pub(crate) fn production(store: &str, broker: &str) -> Result<Self, String> {
        let postgres = PgConnectOptions::from_str(store).map_err(|_| {
            "--store is not a URL of PostgreSQL; use postgres://USER:PASSWORD@HOST:PORT/DATABASE"
                .to_owned()
        })?;
        with_database(store, "x").ok_or("--store names no database")?;
        handfast_service::broker::rabbitmq::Addresses::parse(broker)
            .map_err(|why| format!("--broker {why}"))?;
        if broker.contains(',') {
            return Err("--broker: the demo takes one address".to_owned());
        }
        Ok(Self::Production {
            postgres: Box::new(postgres),
            postgres_url: store.to_owned(),
            broker: broker.to_owned(),
        })
    }
}

/// The engines of one run.
pub(crate) enum Engines {
    /// Files in the folder of the run.
    Embedded,
    /// Databases and names that were made for it.
    Production(Box<Production>),
}

/// Databases and names on servers.
pub(crate) struct Production {
    postgres: PgConnectOptions,
    postgres_url: String,
    broker: String,
    /// What all names begin with.
    deployment: String,
    proxy: Proxy,
}

impl Engines {
    /// Makes what the run needs on the servers.
    pub(crate) async fn make(wanted: Wanted, chance: &mut impl Rng) -> Result<Self, Error> {
        let Wanted::Production {
            postgres,
            postgres_url,
            broker,
        } = wanted
        else {
            return Ok(Self::Embedded);
        };
        let proxy = Proxy::start(&broker).await?;
        let production = Production {
            postgres: *postgres,
            postgres_url,
            broker,
            deployment: format!("handfast_demo_{:08x}", chance.random::<u32>()),
            proxy,
        };
        // Both are asked before anything is made, so that there is nothing to take away.
        let server = production.server().await.map_err(Error::Postgres)?;
        production.rabbitmq().await?;
        let made = timeout(SERVERS_WITHIN, production.create(server)).await;
        let made = made.unwrap_or_else(|_| Err(no_answer()));
        if let Err(error) = made {
            // Nobody has made a queue yet.
            production.drop_databases().await;
            return Err(Error::Postgres(error));
        }
        Ok(Self::Production(Box::new(production)))
    }

    /// The shortened timers.
    pub(crate) const fn timers(&self) -> Timers {
        match self {
            Self::Embedded => EMBEDDED,
            Self::Production(_) => PRODUCTION,
        }
    }

    /// True on servers.
    pub(crate) const fn is_production(&self) -> bool {
        matches!(self, Self::Production(_))
    }

    /// What a process is told of its database; `file` is its file if it has one.
    pub(crate) fn database(&self, role: Role, file: &Path) -> String {
        match self {
            Self::Embedded => file.display().to_string(),
            Self::Production(production) => production.url(role),
        }
    }

    /// The lines of `[server]` that name store and broker.
    pub(crate) fn server_lines(&self, file: &Path) -> String {
        // TOML's basic strings escape as JSON's do.
        let quoted = |text: String| serde_json::Value::from(text);
        match self {
            Self::Embedded => format!(
                "store = {}\nbroker = \"embedded\"\n",
                quoted(format!("sqlite:{}", file.display()))
            ),
            Self::Production(production) => format!(
                "store = {}\nbroker = {}\ndeployment = \"{}\"\n",
                quoted(production.url(Role::Service)),
                quoted(production.proxy.url().to_owned()),
                production.deployment
            ),
        }
    }

    /// Where consumers take deliveries from.
    pub(crate) fn source(&self, service: &str) -> String {
        match self {
            Self::Embedded => service.to_owned(),
            Self::Production(production) => production.proxy.url().to_owned(),
        }
    }

    /// Of which deployment.
    pub(crate) fn deployment(&self) -> &str {
        match self {
            Self::Embedded => "handfast",
            Self::Production(production) => &production.deployment,
        }
    }

    /// Cuts every connection to RabbitMQ. False where there is none.
    pub(crate) fn cut(&self) -> bool {
        match self {
            Self::Embedded => false,
            Self::Production(production) => {
                production.proxy.cut();
                true
            }
        }
    }

    /// Connects to the database of a process, on servers.
    pub(crate) async fn connect(&self, role: Role) -> Result<Option<PgConnection>, sqlx::Error> {
        match self {
            Self::Embedded => Ok(None),
            Self::Production(production) => connect(&production.options(role)).await.map(Some),
        }
    }

    /// What is told at the beginning.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Embedded => "SQLite files, embedded broker".to_owned(),
            Self::Production(production) => format!(
                "PostgreSQL (four databases {name}_…) and RabbitMQ (names {name}.…)",
                name = production.deployment
            ),
        }
    }

    /// Takes away what was made on the servers.
    pub(crate) async fn remove(&self) {
        if let Self::Production(production) = self {
            production.remove().await;
        }
    }
}

impl Production {
    fn database(&self, role: Role) -> String {
        format!("{}_{role}", self.deployment)
    }

    fn url(&self, role: Role) -> String {
        // It was possible when the URL was read.
        with_database(&self.postgres_url, &self.database(role)).unwrap_or_default()
    }

    fn options(&self, role: Role) -> PgConnectOptions {
        self.postgres.clone().database(&self.database(role))
    }

    async fn server(&self) -> Result<PgConnection, sqlx::Error> {
        connect(&self.postgres).await
    }

    async fn create(&self, mut server: PgConnection) -> Result<(), sqlx::Error> {
        for role in Role::ALL {
            run(
                &mut server,
                format!("CREATE DATABASE {}", self.database(role)),
            )
            .await?;
        }
        server.close().await
    }

    /// That RabbitMQ is there and lets us in.
    async fn rabbitmq(&self) -> Result<Connection, Error> {
        let connecting = Connection::connect(&self.broker, ConnectionProperties::default());
        match timeout(SERVERS_WITHIN, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(Error::RabbitMq(error.to_string())),
            Err(_) => Err(Error::RabbitMq("no answer".to_owned())),
        }
    }

    async fn remove(&self) {
        self.drop_databases().await;
        if let Err(error) = self.delete_queues().await {
            eprintln!(
                "warning: queues {}.… may be left in RabbitMQ: {error}",
                self.deployment
            );
        }
    }

    async fn drop_databases(&self) {
        let dropping = async {
            let mut server = self.server().await?;
            for role in Role::ALL {
                let name = self.database(role);
                run(
                    &mut server,
                    format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"),
                )
                .await?;
            }
            server.close().await
        };
        let dropped = timeout(SERVERS_WITHIN, dropping).await;
        if let Err(error) = dropped.unwrap_or_else(|_| Err(no_answer())) {
            eprintln!(
                "warning: databases {}_… may be left on the server: {error}",
                self.deployment
            );
        }
    }

    async fn delete_queues(&self) -> Result<(), Error> {
        let failed = |error: lapin::Error| Error::RabbitMq(error.to_string());
        let connection = self.rabbitmq().await?;
        let names = handfast_service::broker::rabbitmq::Names::new(&self.deployment);
        let mut queues = vec![names.acknowledge(), names.mark()];
        queues.extend([Role::Accounting, Role::Points].map(|role| names.queue(role.name())));
        let deleting = async {
            let channel = connection.create_channel().await?;
            for queue in queues {
                let options = QueueDeleteOptions::default();
                channel.queue_delete(queue.into(), options).await?;
            }
            connection.close(200, "bye".into()).await
        };
        match timeout(SERVERS_WITHIN, deleting).await {
            Ok(deleted) => deleted.map_err(failed),
            Err(_) => Err(Error::RabbitMq("no answer".to_owned())),
        }
    }
}

async fn run(server: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(server).await?;
    Ok(())
}

/// A server that stands still takes connections and says nothing.
async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    let connected = timeout(SERVERS_WITHIN, options.connect()).await;
    connected.unwrap_or_else(|_| Err(no_answer()))
}

/// What is said of a server that says nothing.
pub(crate) fn no_answer() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::other("no answer"))
}

/// The URL with another database; None if it names none.
fn with_database(url: &str, database: &str) -> Option<String> {
    let (before, query) = match url.split_once('?') {
        Some((before, query)) => (before, format!("?{query}")),
        None => (url, String::new()),
    };
    let (scheme, rest) = before.split_once("://")?;
    let (server, named) = rest.split_once('/')?;
    (!named.is_empty()).then(|| format!("{scheme}://{server}/{database}{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_database_on_the_same_server_has_the_same_url() {
        assert_eq!(
            with_database("postgres://u:p@h:1/d?sslmode=disable", "x").as_deref(),
            Some("postgres://u:p@h:1/x?sslmode=disable")
        );
        assert_eq!(with_database("postgres://u:p@h:1", "x"), None);
    }

    #[test]
    fn wrong_urls_are_refused_without_their_passwords() {
        for (store, broker) in [
            ("postgres://u:secret@h:port/d", "amqp://h"),
            ("postgres://u:secret@h", "amqp://h"),
            ("postgres://h/d", "amqps://u:secret@h"),
            ("postgres://h/d", "amqp://u:secret@h,amqp://u:secret@i"),
        ] {
            let why = Wanted::production(store, broker).err().unwrap();
            assert!(!why.contains("secret") && why.lines().count() == 1, "{why}");
        }
        assert!(Wanted::production("postgres://h/d", "amqp://h/%2f").is_ok());
    }
}
