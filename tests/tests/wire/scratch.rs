//! Databases and a deployment of a test's own, on the servers that the environment names.

use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, ConnectionProperties};
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

    /// The queue of a subscription, or of answers.
    pub(crate) fn queue(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
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
            let rabbit = Rabbit::connect().await;
            for queue in queues {
                let options = QueueDeleteOptions::default();
                let deleted = rabbit.channel.queue_delete(queue.into(), options);
                deleted.await.unwrap();
            }
        });
    }
}

/// RabbitMQ, by hand.
pub(crate) struct Rabbit {
    channel: Channel,
    _connection: lapin::Connection,
}

impl Rabbit {
    /// With publisher confirms.
    pub(crate) async fn connect() -> Self {
        let properties = ConnectionProperties::default();
        let connection = lapin::Connection::connect(&Deployment::url(), properties)
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        let confirm = ConfirmSelectOptions::default();
        channel.confirm_select(confirm).await.unwrap();
        Self {
            channel,
            _connection: connection,
        }
    }

    /// Declares a quorum queue, as the service would.
    pub(crate) async fn declare(&self, queue: String, limit: Option<i32>) {
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        if let Some(limit) = limit {
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(limit));
        }
        let options = QueueDeclareOptions::durable();
        let declared = self.channel.queue_declare(queue.into(), options, arguments);
        declared.await.unwrap();
    }

    /// Puts a message into a queue that is there.
    pub(crate) async fn put(&self, queue: String, properties: BasicProperties, body: &[u8]) {
        let mandatory = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let published =
            self.channel
                .basic_publish("".into(), queue.into(), mandatory, body, properties);
        let confirm = published.await.unwrap().await.unwrap();
        assert_eq!(confirm, Confirmation::Ack(None));
    }

    /// Takes a message out of a queue.
    pub(crate) async fn take(&self, queue: String) -> Option<Vec<u8>> {
        let options = BasicGetOptions { no_ack: true };
        let taken = self.channel.basic_get(queue.into(), options).await.unwrap();
        taken.map(|message| message.delivery.data)
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
