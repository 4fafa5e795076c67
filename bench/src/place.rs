//! The databases and names of one run: new ones each time, so that every round meets the same.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lapin::options::QueueDeleteOptions;
use lapin::{Connection, ConnectionProperties};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tokio::time::timeout;
use uuid::Uuid;

use crate::servers::Servers;
use crate::{Failure, topology};

/// An end that was not confirmed by then is left to happen by itself.
const CLOSE: Duration = Duration::from_secs(2);

/// Places on servers that stay, and the URL of their PostgreSQL: an interrupted run leaves none.
static OPEN: Mutex<Vec<(String, Place)>> = Mutex::new(Vec::new());

fn open() -> MutexGuard<'static, Vec<(String, Place)>> {
    // A panic while the lock is held leaves a whole list.
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the places of an interrupted run. What cannot be removed is said.
pub(crate) async fn remove_open() {
    let all = std::mem::take(&mut *open());
    for (postgres, place) in all {
        let name = place.deployment.clone();
        let mut subscriptions = topology::subscriptions(topology::MOST_SUBSCRIPTIONS);
        subscriptions.push(topology::ASLEEP.to_owned());
        if let Err(Failure(line)) = place.remove_at(&postgres, &subscriptions).await {
            eprintln!("databases and queues named {name}* are left: {line}");
        }
    }
}

/// Where one run happens.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The service's database.
    pub(crate) store: String,
    /// The consumers' database.
    pub(crate) inbox: String,
    /// The producer's own database.
    pub(crate) business: String,
    pub(crate) amqp: String,
    /// What every name in RabbitMQ begins with.
    pub(crate) deployment: String,
}

impl Place {
    /// Makes the databases.
    pub(crate) async fn make(servers: &Servers) -> Result<Self, Failure> {
        let name = format!("bench_{}", &Uuid::new_v4().simple().to_string()[..12]);
        let [store, inbox, business] =
            databases(&name).map(|database| url_of(&servers.postgres, &database));
        let place = Self {
            store,
            inbox,
            business,
            amqp: servers.amqp.clone(),
            deployment: name,
        };
        // Before anything is made, so that nothing is forgotten.
        if servers.stay() {
            open().push((servers.postgres.clone(), place.clone()));
        }
        let mut admin = servers.admin().await?;
        for database in databases(&place.deployment) {
            admin
                .execute(AssertSqlSafe(format!("CREATE DATABASE {database}")))
                .await
                .map_err(Failure::of("create a database"))?;
        }
        Ok(place)
    }

    /// Removes what it made, and the queues of these subscriptions.
    pub(crate) async fn remove(
        self,
        servers: &Servers,
        subscriptions: &[String],
    ) -> Result<(), Failure> {
        open().retain(|(_, place)| place.deployment != self.deployment);
        self.remove_at(&servers.postgres, subscriptions).await
    }

    async fn remove_at(self, postgres: &str, subscriptions: &[String]) -> Result<(), Failure> {
        let connection = connect(&self.amqp).await?;
        let own = ["acknowledge", "mark"].map(str::to_owned);
        for name in own.iter().chain(subscriptions) {
            let queue = self.queue(name);
            let channel = connection.create_channel().await;
            let channel = channel.map_err(Failure::of("open a channel"))?;
            let options = QueueDeleteOptions::default();
            channel
                .queue_delete(queue.as_str().into(), options)
                .await
                .map_err(Failure::of("delete a queue"))?;
        }
        // lapin may end its own loop before it says that RabbitMQ has closed; then nobody answers.
        let _ = timeout(CLOSE, connection.close(200, "done".into())).await;
        let mut admin = admin(postgres).await?;
        for database in databases(&self.deployment) {
            let drop = format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)");
            admin
                .execute(AssertSqlSafe(drop))
                .await
                .map_err(Failure::of("drop a database"))?;
        }
        Ok(())
    }

    /// The name of the service's database.
    pub(crate) fn store_database(&self) -> String {
        let [store, ..] = databases(&self.deployment);
        store
    }

    /// The queue of a subscription.
    pub(crate) fn queue(&self, subscription: &str) -> String {
        format!("{}.{subscription}", self.deployment)
    }
}

/// A connection that may create databases.
pub(crate) async fn admin(postgres: &str) -> Result<PgConnection, Failure> {
    PgConnection::connect(postgres)
        .await
        .map_err(Failure::of("connect to PostgreSQL"))
}

/// A connection to RabbitMQ.
pub(crate) async fn connect(amqp: &str) -> Result<Connection, Failure> {
    Connection::connect(amqp, ConnectionProperties::default())
        .await
        .map_err(Failure::of("connect to RabbitMQ"))
}

fn databases(name: &str) -> [String; 3] {
    ["store", "inbox", "business"].map(|whose| format!("{name}_{whose}"))
}

/// The same server's URL of another database.
fn url_of(url: &str, database: &str) -> String {
    let (url, query) = match url.split_once('?') {
        Some((url, query)) => (url, format!("?{query}")),
        None => (url, String::new()),
    };
    let server = match url.split_once("://").map(|(_, rest)| rest.contains('/')) {
        Some(true) => url.rsplit_once('/').map_or(url, |(server, _)| server),
        _ => url,
    };
    format!("{server}/{database}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_database_of_the_same_server() {
        for (url, expected) in [
            ("postgres://me@db:5432/one", "postgres://me@db:5432/two"),
            ("postgres://me@db", "postgres://me@db/two"),
            (
                "postgres://db/one?sslmode=require",
                "postgres://db/two?sslmode=require",
            ),
        ] {
            assert_eq!(url_of(url, "two"), expected);
        }
    }
}
