use handfast_scratch::Scratch;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, ConnectOptions as _};

use super::session::{Session, Use};
use super::time::span;
use super::*;
use crate::clock::SystemClock;
use crate::message::{AnswerKind, DeliveryPolicy, MessageEvent};
use crate::store::conformance::{Harness, conformance_suite};
use crate::topology::{Producer, Subscription, Topic};

/// A store in a database of its own.
struct OnPostgres {
    store: Arc<PostgresStore>,
    // Dropped behind the store.
    database: Scratch,
}

impl OnPostgres {
    /// Another connection, as a person with a shell would have it.
    async fn by_hand(&self) -> PgConnection {
        self.database.options().connect().await.unwrap()
    }

    async fn run(&self, sql: &str) {
        run(&mut self.by_hand().await, sql).await;
    }

    /// Another process on the same database.
    async fn another(&self) -> Arc<PostgresStore> {
        opened(&self.database, 2).await
    }
}

async fn run(db: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(db)
        .await
        .unwrap();
}

async fn opened(database: &Scratch, seed: u64) -> Arc<PostgresStore> {
    let clock = Arc::new(SystemClock::new());
    Arc::new(
        PostgresStore::open(database.options(), clock, seed)
            .await
            .unwrap(),
    )
}

async fn open() -> OnPostgres {
    let database = Scratch::create().await;
    let store = opened(&database, 1).await;
    OnPostgres { store, database }
}

/// A store whose database has a clock that a test moves: a function of the same name, which is
/// found before the database's own.
async fn open_with_clock() -> OnPostgres {
    let database = Scratch::create().await;
    let mut db = database.options().connect().await.unwrap();
    run(
        &mut db,
        "CREATE TABLE clock_offset (ahead interval NOT NULL);
         INSERT INTO clock_offset VALUES ('0');
         CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
             AS 'SELECT pg_catalog.clock_timestamp() + ahead FROM public.clock_offset';
         DO $$ BEGIN
             EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog',
                            current_database());
         END $$",
    )
    .await;
    let store = opened(&database, 1).await;
    OnPostgres { store, database }
}

#[async_trait]
impl Harness for OnPostgres {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    async fn pass(&self, passed: Duration) {
        sqlx::query("UPDATE clock_offset SET ahead = ahead + $1")
            .bind(span(passed))
            .execute(&mut self.by_hand().await)
            .await
            .unwrap();
        let mut session = Session::new(
            self.store.options.clone(),
            Use::Read,
            self.store.repeats.clone(),
        );
        self.store.clock.refresh(&mut session).await.unwrap();
    }

    async fn write_unknown_state(&self, table: &str, id: MessageId) {
        let column = if table == "message" {
            "id"
        } else {
            "message_id"
        };
        self.run(&format!(
            "UPDATE {table} SET state = 'ARCHIVED' WHERE {column} = '{id}'"
        ))
        .await;
    }
}

mod conforms {
    use super::*;
    conformance_suite!(open_with_clock);
}

mod handoff;
mod plans;
mod races;
mod replicas;
mod trouble;
mod turns;
mod upkeep;

const TOPIC: &str = "paid";
const LEASE: Duration = Duration::from_secs(30);
const CHECK_AFTER: Duration = Duration::from_secs(10);

fn topology(version: u64, subscriptions: &[&str]) -> Topology {
    let subscription = |name: &&str| {
        let subscription = Subscription {
            topic: TOPIC.into(),
            policy: DeliveryPolicy::default(),
            max_in_queue: None,
            amqp_user: None,
        };
        ((*name).to_owned(), subscription)
    };
    Topology {
        version,
        producers: [("payment".to_owned(), Producer::default())].into(),
        topics: [(TOPIC.to_owned(), Topic::default())].into(),
        subscriptions: subscriptions.iter().map(subscription).collect(),
    }
}

/// A store with a topology.
async fn ready() -> OnPostgres {
    let harness = open().await;
    let topology = topology(1, &["accounting", "points"]);
    harness.store.apply_topology(topology).await.unwrap();
    harness
}

fn id(n: u128) -> MessageId {
    MessageId::from(Uuid::from_u128(n))
}

fn paid(n: u128) -> NewMessage {
    NewMessage {
        id: id(n),
        producer: "payment".into(),
        topic: TOPIC.into(),
        key: None,
        content_type: String::new(),
        headers: Vec::new(),
        payload: vec![b'x'; 100],
        deliver_after: None,
        fence: None,
    }
}

fn normal(limit: usize) -> Lane {
    Lane::Normal {
        limit,
        max_bytes: usize::MAX,
    }
}

fn consumed(n: u128) -> Answer {
    Answer {
        id: id(n),
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    }
}

fn confirm(n: u128) -> Decision {
    Decision {
        id: id(n),
        event: MessageEvent::Confirm,
    }
}

fn is_unavailable<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Unavailable { .. }))
}
