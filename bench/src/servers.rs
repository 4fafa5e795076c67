//! The servers of a run: throwaway ones, unless others are named.

use handfast_servers::{Options as ServerOptions, Postgres, Program, RabbitMq, install_missing};
use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use sqlx::{Connection as _, Row as _};

use crate::Failure;
use crate::options::Options;

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

/// PostgreSQL and RabbitMQ. Dropped, the throwaway ones go.
pub(crate) struct Servers {
    pub(crate) postgres: String,
    pub(crate) amqp: String,
    _own: (Option<Postgres>, Option<RabbitMq>),
}

impl Servers {
    /// Starts those that are not named.
    pub(crate) async fn start(options: &Options) -> Result<Self, Failure> {
        let (store, broker) = (options.store.clone(), options.broker.clone());
        if store.is_none() || broker.is_none() {
            eprintln!("starting throwaway servers");
        }
        let started = tokio::task::spawn_blocking(move || start(store, broker)).await;
        started.map_err(Failure::of("start servers"))?
    }

    /// Versions and settings, as the servers say them.
    pub(crate) async fn described(&self) -> Result<Value, Failure> {
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
        Ok(json!({ "postgresql": settings }))
    }

    /// A connection that may create databases.
    pub(crate) async fn admin(&self) -> Result<PgConnection, Failure> {
        PgConnection::connect(&self.postgres)
            .await
            .map_err(Failure::of("connect to PostgreSQL"))
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
        _own: (postgres, rabbitmq),
    })
}
