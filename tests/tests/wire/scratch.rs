//! Databases and a deployment of a test's own, on the servers that the environment names.

use lapin::ConnectionProperties;
use lapin::options::QueueDeleteOptions;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use uuid::Uuid;

/// A new database; it goes when this is dropped, with everybody who is connected to it.
pub(crate) struct Database {
    name: String,
    /// How others find it.
    pub(crate) url: String,
    /// For the test itself.
    pub(crate) pool: PgPool,
}

impl Database {
    /// A database with this in it.
    pub(crate) async fn with(schema: &str) -> Self {
        let name = format!("handfast_test_{}", Uuid::new_v4().simple());
        run(&postgres(), format!("CREATE DATABASE {name}")).await;
        let url = with_database(&postgres(), &name);
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy(&url)
            .unwrap();
        let database = Self { name, url, pool };
        run(&database.url, schema.to_owned()).await;
        database
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        finally(async move { run(&postgres(), sql).await });
    }
}

fn postgres() -> String {
    server("HANDFAST_TEST_POSTGRES")
}

/// The same URL with another database. What sqlx makes of its options is not for everybody.
fn with_database(url: &str, name: &str) -> String {
    let (place, options) = url.split_once('?').unwrap_or((url, ""));
    let (server, _) = place.rsplit_once('/').unwrap();
    match options {
        "" => format!("{server}/{name}"),
        options => format!("{server}/{name}?{options}"),
    }
}

/// Names of a deployment; when this is dropped, its queues go.
pub(crate) struct Deployment {
    pub(crate) name: String,
    queues: Vec<String>,
}

impl Deployment {
    /// A new one, with these subscriptions.
    pub(crate) fn new(subscriptions: &[&str]) -> Self {
        let name = format!("test-{}", Uuid::new_v4().simple());
        let queues = ["acknowledge", "mark"].iter().chain(subscriptions);
        Self {
            queues: queues.map(|queue| format!("{name}.{queue}")).collect(),
            name,
        }
    }

    /// Where its RabbitMQ is.
    pub(crate) fn url() -> String {
        server("HANDFAST_TEST_AMQP")
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        let queues = std::mem::take(&mut self.queues);
        finally(async move {
            let connection =
                lapin::Connection::connect(&Self::url(), ConnectionProperties::default())
                    .await
                    .unwrap();
            let channel = connection.create_channel().await.unwrap();
            for queue in queues {
                let deleted = channel.queue_delete(queue.into(), QueueDeleteOptions::default());
                deleted.await.unwrap();
            }
        });
    }
}

fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set; run `cargo xtask test`, or name a server")
    })
}

/// Runs the end of a test in a thread of its own, because its runtime cannot be waited for
/// inside of it.
fn finally(end: impl Future<Output = ()> + Send + 'static) {
    let ending = std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(end);
    });
    // A test that has failed says more than what it leaves.
    let ended = ending.join();
    assert!(ended.is_ok() || std::thread::panicking());
}

async fn run(url: &str, sql: String) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&mut connection)
        .await
        .unwrap();
}
