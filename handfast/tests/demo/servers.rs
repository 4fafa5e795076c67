//! The servers that others run, what a demo has left on them, and a way to lose one.

use std::str::FromStr as _;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Where the servers are. Without them a test fails: there is nothing else it could say.
pub(crate) fn servers() -> (String, String) {
    let server = |variable: &str| {
        std::env::var(variable).unwrap_or_else(|_| {
            panic!("{variable} is not set; run `cargo xtask test`, or name a server")
        })
    };
    (
        server("HANDFAST_TEST_POSTGRES"),
        server("HANDFAST_TEST_AMQP"),
    )
}

/// What all names of a run on servers begin with, by what it says at its beginning.
pub(crate) fn deployment(said: &str) -> &str {
    let begin = said.find("handfast_demo_").expect("the names are told");
    &said[begin..begin + "handfast_demo_".len() + 8]
}

/// Whether its queue of answers is left.
pub(crate) async fn has_queue(broker: &str, deployment: &str) -> bool {
    let options = lapin::ConnectionProperties::default();
    let rabbitmq = lapin::Connection::connect(broker, options).await.unwrap();
    let channel = rabbitmq.create_channel().await.unwrap();
    let passive = lapin::options::QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let queue = format!("{deployment}.acknowledge");
    let looked = channel.queue_declare(queue.into(), passive, Default::default());
    looked.await.is_ok()
}

/// The databases of a run that are left.
pub(crate) async fn databases(store: &str, deployment: &str) -> Vec<String> {
    let mut db = PgConnection::connect(store).await.unwrap();
    sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname LIKE $1 || '\\_%'")
        .bind(deployment)
        .fetch_all(&mut db)
        .await
        .unwrap()
}

/// Takes databases away that a demo could not.
pub(crate) async fn drop_all(store: &str, databases: &[String]) {
    let mut db = PgConnection::connect(store).await.unwrap();
    for name in databases {
        run(&mut db, format!("DROP DATABASE {name} WITH (FORCE)")).await;
    }
}

/// A user who may make databases. What they own was made by whoever was given their URL, which is
/// how leftovers are found of which no name was told.
pub(crate) struct Owner {
    db: PgConnection,
    name: String,
    pub(crate) url: String,
}

impl Owner {
    pub(crate) async fn create(store: &str) -> Self {
        let options = PgConnectOptions::from_str(store).unwrap();
        let mut db = options.connect().await.unwrap();
        let name = format!("handfast_owner_{}", uuid::Uuid::new_v4().simple());
        let create = format!("CREATE ROLE {name} LOGIN CREATEDB PASSWORD 'secret'");
        run(&mut db, create).await;
        let options = options.username(&name).password("secret");
        let url = options.to_url_lossy().to_string();
        Self { db, name, url }
    }

    /// Removes the user with all that they own, and returns that.
    pub(crate) async fn remove(mut self) -> Vec<String> {
        let owned: Vec<String> = sqlx::query_scalar(
            "SELECT datname::text FROM pg_database
              WHERE datdba = (SELECT oid FROM pg_roles WHERE rolname = $1)",
        )
        .bind(&self.name)
        .fetch_all(&mut self.db)
        .await
        .unwrap();
        for name in &owned {
            run(&mut self.db, format!("DROP DATABASE {name} WITH (FORCE)")).await;
        }
        run(&mut self.db, format!("DROP ROLE {}", self.name)).await;
        owned
    }
}

async fn run(db: &mut PgConnection, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(db).await.unwrap();
}

/// A way to PostgreSQL. Dropped, it is as if the server were gone: nobody listens, and every
/// connection is closed.
pub(crate) struct Way {
    pub(crate) url: String,
    _runtime: Runtime,
}

impl Way {
    pub(crate) fn to(store: &str) -> Self {
        let options = PgConnectOptions::from_str(store).unwrap();
        let server = (options.get_host().to_owned(), options.get_port());
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let server = server.clone();
                tokio::spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(server).await {
                        // However it ends, both ends are closed then.
                        let _ = copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
        let options = options.host("127.0.0.1").port(port);
        Self {
            url: options.to_url_lossy().to_string(),
            _runtime: runtime,
        }
    }
}
