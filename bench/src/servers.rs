//! The servers of a run: throwaway ones, unless others are named.

use std::path::Path;
use std::time::Duration;

use handfast_servers::{Options as ServerOptions, Postgres, Program, RabbitMq, install_missing};
use serde_json::{Value, json};
use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use crate::Failure;
use crate::options::Options;
use crate::place::admin;

/// What a throwaway PostgreSQL is told for speed; all else that matters is its default.
const SETTINGS: [(&str, &str); 2] = [("shared_buffers", "512MB"), ("max_wal_size", "4GB")];
/// What a reader of a figure needs to know about PostgreSQL.
const SHOWN: [&str; 7] = [
    "server_version",
    "shared_buffers",
    "max_wal_size",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "max_connections",
];

/// What must be on, or nothing is durable.
const DURABLE: [&str; 3] = ["fsync", "synchronous_commit", "full_page_writes"];

/// PostgreSQL and RabbitMQ. Dropped, the throwaway ones go.
pub(crate) struct Servers {
    pub(crate) postgres: String,
    pub(crate) amqp: String,
    own: (Option<Postgres>, Option<RabbitMq>),
}

impl Servers {
    /// Starts those that are not named, on a machine that does nothing else, and says what a
    /// reader of the figures needs to know.
    pub(crate) async fn start(options: &Options) -> Result<(Self, Value), Failure> {
        let load_average = options.load_average()?;
        let servers = Self::started(options).await?;
        let mut about = servers.described().await?;
        for setting in DURABLE {
            let found = &about["postgresql"][setting];
            if found != "on" {
                return Err(Failure(format!(
                    "PostgreSQL is not durable: {setting} is {found}; figures without it say \
                     nothing, so set it to on"
                )));
            }
        }
        if !options.anyway {
            servers.check_idle().await?;
        }
        println!("load average at the start: {load_average}; {about}");
        if let Some(about) = about.as_object_mut() {
            about.insert("load_average".to_owned(), load_average.into());
        }
        Ok((servers, about))
    }

    async fn started(options: &Options) -> Result<Self, Failure> {
        let (store, broker) = (options.store.clone(), options.broker.clone());
        if store.is_none() || broker.is_none() {
            eprintln!("starting throwaway servers");
        }
        let started = tokio::task::spawn_blocking(move || start(store, broker)).await;
        started.map_err(Failure::of("start servers"))?
    }

    /// Versions and settings, as the servers say them.
    async fn described(&self) -> Result<Value, Failure> {
        let mut db = self.admin().await?;
        let mut settings = serde_json::Map::new();
        for name in SHOWN {
            let value: String = sqlx::query("SELECT current_setting($1) AS value")
                .bind(name)
                .fetch_one(&mut db)
                .await
                .and_then(|row| row.try_get("value"))
                .map_err(Failure::of("read PostgreSQL's settings"))?;
            settings.insert(name.to_owned(), value.into());
        }
        // A named one tells its version to its operators only.
        let version = self
            .own
            .1
            .as_ref()
            .map(|rabbitmq| rabbitmq.ctl(&["version"]));
        let version = version
            .transpose()
            .map_err(Failure::of("ask RabbitMQ for its version"))?;
        let version = version.as_deref().unwrap_or("not known").trim();
        Ok(json!({ "postgresql": settings, "rabbitmq": version }))
    }

    /// Refuses a PostgreSQL that somebody else works with.
    async fn check_idle(&self) -> Result<(), Failure> {
        let others = "SELECT count(*) FROM pg_stat_activity
                       WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let others: i64 = sqlx::query_scalar(others)
            .fetch_one(&mut self.admin().await?)
            .await
            .map_err(Failure::of("ask PostgreSQL who else is there"))?;
        match others {
            0 => Ok(()),
            others => Err(Failure(format!(
                "PostgreSQL is in use: {others} other connections; measure with --anyway, or leave \
                 --store out"
            ))),
        }
    }

    /// Where the data of a throwaway PostgreSQL is.
    pub(crate) fn postgres_folder(&self) -> Option<&Path> {
        self.own.0.as_ref().map(Postgres::folder)
    }

    /// Ends the throwaway RabbitMQ for so long, and returns when it is there again.
    pub(crate) async fn rabbitmq_gone(&mut self, gone: Duration) -> Result<(), Failure> {
        let rabbitmq = self.own.1.take();
        let mut rabbitmq = rabbitmq.ok_or_else(|| {
            Failure("only a throwaway RabbitMQ can be ended; leave --broker out".to_owned())
        })?;
        let ended = tokio::task::spawn_blocking(move || rabbitmq.kill().map(|()| rabbitmq));
        let ended = ended.await.map_err(Failure::of("end RabbitMQ"))?;
        let mut rabbitmq = ended.map_err(Failure::of("end RabbitMQ"))?;
        tokio::time::sleep(gone).await;
        let again = tokio::task::spawn_blocking(move || rabbitmq.start_again().map(|()| rabbitmq));
        let again = again.await.map_err(Failure::of("start RabbitMQ again"))?;
        self.own.1 = Some(again.map_err(Failure::of("start RabbitMQ again"))?);
        Ok(())
    }

    /// A connection that may create databases.
    pub(crate) async fn admin(&self) -> Result<PgConnection, Failure> {
        admin(&self.postgres).await
    }

    /// Whether one of them stays when this is dropped.
    pub(crate) fn stay(&self) -> bool {
        self.own.0.is_none() || self.own.1.is_none()
    }
}

fn start(store: Option<String>, broker: Option<String>) -> Result<Servers, Failure> {
    let wanted = [
        store.is_none().then_some(Program::Postgres),
        broker.is_none().then_some(Program::RabbitMq),
    ];
    let wanted: Vec<_> = wanted.into_iter().flatten().collect();
    install_missing(&wanted).map_err(Failure::of("install servers"))?;
    let postgres = match &store {
        Some(_) => None,
        None => {
            let options = ServerOptions::new().with_settings(&SETTINGS);
            let started = Postgres::start_with(&options);
            Some(started.map_err(Failure::of("start PostgreSQL"))?)
        }
    };
    let rabbitmq = match &broker {
        Some(_) => None,
        None => Some(RabbitMq::start().map_err(Failure::of("start RabbitMQ"))?),
    };
    // One of the two is there: what was named, or what was started.
    let url = postgres.as_ref().map(Postgres::admin_url);
    let amqp = rabbitmq.as_ref().map(RabbitMq::url);
    Ok(Servers {
        postgres: store.or(url).unwrap_or_default(),
        amqp: broker.or(amqp).unwrap_or_default(),
        own: (postgres, rabbitmq),
    })
}
