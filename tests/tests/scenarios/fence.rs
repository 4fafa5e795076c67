//! The producer and the check race for the fence row: whoever comes second learns what the
//! first has made true, and a check that reaches another database makes nothing true.

use std::sync::Arc;
use std::time::Duration;

use handfast_producer::{
    Fence, Message, Outcome, Producer, StatusServer, TransactError, Tx, migrate,
};
use handfast_proto::v1::{NewMessage, ShowMessageRequest};
use handfast_tests::books;
use handfast_tests::clients::{message, name_of};
use handfast_tests::database::{number, rows};
use handfast_tests::{
    Config, Database, Engines, Party, Schema, World, eventually, in_either, on_both_engines, stays,
};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

on_both_engines! {
    a_try_that_is_held_before_its_fence_row_is_cancelled_and_made_again,
    a_try_that_is_held_after_its_fence_row_is_in_progress_until_it_commits,
    a_check_that_reaches_another_database_is_unknown_and_never_a_rollback,
}

const SHOP: &str = "shop";
const TOPIC: &str = "order.paid";
const STATUS_PORT: u16 = 8_000;
const SOON: Duration = Duration::from_secs(20);
const PAID: Schema =
    Schema::both("CREATE TABLE paid (message_id bytea NOT NULL, order_id text NOT NULL)");

/// A service, or two where there may be two, and a producer in this process with a database and a
/// status server.
struct Scene {
    world: World,
    producer: Producer,
    pool: Database,
}

impl Scene {
    /// The producer's pool has this many connections; checks have their own.
    async fn new(engines: Engines, connections: u32) -> Self {
        let mut world = World::bare(engines, Config::empty());
        world.config = Config::empty()
            .producer(SHOP, world.address(STATUS_PORT))
            .topic(TOPIC)
            .subscription("reader", TOPIC);
        world.start(Party::Service).await;
        let mut services = world.service_url();
        if engines == Engines::Production {
            world.start_replica("replica").await;
            services = world.replicated_url();
        }
        let producer = Producer::connect(services, SHOP).await;
        let pool = database(&world, "orders", connections).await;
        Self {
            producer: producer.unwrap().with_deadline(SOON),
            world,
            pool,
        }
    }

    /// Serves checks for these databases until the value is dropped.
    fn status_server(&self, pools: &[&Database]) -> (DropGuard, JoinHandle<()>) {
        let mut server = StatusServer::new();
        for pool in pools {
            server = in_either!(pool, pool => server.fence(pool.clone()));
        }
        let stop = CancellationToken::new();
        let serving = server.serve(self.world.address(STATUS_PORT), stop.clone());
        let task = tokio::spawn(async move { serving.await.expect("status checks are served") });
        (stop.drop_guard(), task)
    }

    /// Pays an order in the background; the closure tells that it began and waits for `go_on`.
    fn pays(&self, order: &'static str, go_on: &Arc<Notify>) -> JoinHandle<Paid> {
        let (producer, go_on) = (self.producer.clone(), Arc::clone(go_on));
        let message = Message::new(TOPIC).key(order);
        in_either!(self.pool.clone(), pool => {
            tokio::spawn(async move {
                producer
                    .transact(&pool, message, async |tx: &mut Tx<_>| {
                        go_on.notified().await;
                        let id = tx.message_id();
                        sqlx::query("INSERT INTO paid (message_id, order_id) VALUES ($1, $2)")
                            .bind(&id.as_bytes()[..])
                            .bind(order)
                            .execute(&mut **tx)
                            .await?;
                        Ok(id)
                    })
                    .await
            })
        })
    }

    /// The stored messages once there are as many and this is true of them.
    async fn until(
        &self,
        what: &str,
        holds: impl Fn(&[books::Message]) -> bool,
    ) -> Vec<books::Message> {
        eventually(what, SOON, async || {
            let messages = self.world.books().await.messages;
            match holds(&messages) {
                true => Ok(messages),
                false => Err(format!("{messages:?}")),
            }
        })
        .await
    }

    /// The details of the checks of a message, in order of time.
    async fn checks(&self, id: &[u8]) -> Vec<String> {
        let request = ShowMessageRequest {
            message_id: id.to_vec(),
            with_body: false,
        };
        let shown = self.world.console().show_message(request).await;
        let timeline = shown.expect("an answer").into_inner().timeline;
        let checks = timeline.into_iter().filter(|entry| entry.kind == "check");
        checks.map(|entry| entry.detail).collect()
    }

    /// The reader gets this message and no other, and the fence and the business agree.
    async fn only_this_was_paid(&self, id: Uuid) {
        let id = id.as_bytes().to_vec();
        let mut reader = self.world.reader(TOPIC, "reader").await;
        assert_eq!(reader.takes().await.message_id, id);
        let books = self.world.drained().await;
        assert_eq!(books.deliveries.len(), 1, "one message reaches the reader");
        books.one_decision();
        let paid: Vec<(Vec<u8>,)> = rows(&self.pool, "SELECT message_id FROM paid").await;
        assert_eq!(paid, [(id.clone(),)], "it was paid once");
        let committed = "SELECT message_id FROM handfast_fence WHERE verdict = 'COMMITTED'";
        let committed: Vec<(Vec<u8>,)> = rows(&self.pool, committed).await;
        assert_eq!(committed, [(id,)]);
    }
}

type Paid = Result<Outcome<Uuid>, TransactError<sqlx::Error>>;

/// A producer's database, with a fence and a table for its business.
async fn database(world: &World, name: &str, connections: u32) -> Database {
    let pool = world.own_database_with(name, PAID, connections).await;
    in_either!(&pool, pool => migrate(pool).await.unwrap());
    pool
}

fn is(message: &books::Message, state: &str, by: &str) -> bool {
    message.state == state && message.decided_by.as_deref() == Some(by)
}

async fn a_try_that_is_held_before_its_fence_row_is_cancelled_and_made_again(engines: Engines) {
    let scene = Scene::new(engines, 1).await;
    let _serving = scene.status_server(&[&scene.pool]);
    // So that only the transaction itself still needs the connection that is about to be held.
    let unknown = Message::new("nobody.knows");
    let identity_is_known = in_either!(&scene.pool, pool => {
        let transacted = scene.producer.transact(pool, unknown, async |_| Ok(()));
        transacted.await as Result<_, TransactError<sqlx::Error>>
    });
    assert!(matches!(
        identity_is_known,
        Err(TransactError::Refused { .. })
    ));
    let held: Box<dyn std::any::Any> = in_either!(&scene.pool, pool => {
        Box::new(pool.acquire().await.unwrap())
    });

    let go_on = Arc::new(Notify::new());
    let paying = scene.pays("o-1", &go_on);
    let cancelled =
        |messages: &[books::Message]| matches!(messages, [only] if is(only, "CANCELLED", "CHECK"));
    let first = scene.until("a check cancels the try", cancelled).await;
    assert!(!paying.is_finished(), "it still waits for its connection");
    drop(held);
    go_on.notify_one();

    let outcome = paying.await.unwrap().unwrap();
    let Outcome::Committed(second) = outcome else {
        panic!("{outcome:?}");
    };
    assert_ne!(
        second.as_bytes()[..],
        first[0].id,
        "the second has its own id"
    );
    let both = scene
        .until("the second try is confirmed", |messages| {
            messages.iter().any(|m| m.state == "CONFIRMED")
        })
        .await;
    assert_eq!(both.len(), 2, "one message per try");
    assert!(
        both.iter()
            .any(|m| m.id == first[0].id && is(m, "CANCELLED", "CHECK"))
    );
    assert!(
        both.iter()
            .any(|m| m.id == second.as_bytes() && m.state == "CONFIRMED")
    );
    scene.only_this_was_paid(second).await;
    let rolled_back = "SELECT message_id FROM handfast_fence WHERE verdict = 'ROLLED_BACK'";
    let rolled_back: Vec<(Vec<u8>,)> = rows(&scene.pool, rolled_back).await;
    assert_eq!(rolled_back, [(first[0].id.clone(),)]);
}

async fn a_try_that_is_held_after_its_fence_row_is_in_progress_until_it_commits(engines: Engines) {
    let scene = Scene::new(engines, 2).await;
    let _serving = scene.status_server(&[&scene.pool]);
    let go_on = Arc::new(Notify::new());
    let paying = scene.pays("o-1", &go_on);
    let asked = |messages: &[books::Message]| matches!(messages, [only] if only.checks >= 2);
    let open = scene.until("two checks are answered", asked).await;
    assert_eq!(open[0].state, "PREPARED");
    let checks = scene.checks(&open[0].id).await;
    assert!(
        checks.len() >= 2 && checks.iter().all(|answer| answer == "IN_PROGRESS"),
        "{checks:?}"
    );
    assert!(!paying.is_finished(), "it is still at work");
    go_on.notify_one();

    let outcome = paying.await.unwrap().unwrap();
    let expected = Uuid::from_slice(&open[0].id).unwrap();
    assert_eq!(outcome, Outcome::Committed(expected), "the same try");
    let confirmed =
        |messages: &[books::Message]| matches!(messages, [only] if only.state == "CONFIRMED");
    scene.until("it is confirmed", confirmed).await;
    scene.only_this_was_paid(expected).await;
}

async fn a_check_that_reaches_another_database_is_unknown_and_never_a_rollback(engines: Engines) {
    let scene = Scene::new(engines, 2).await;
    let copy = database(&scene.world, "copy", 2).await;
    let wrong = scene.status_server(&[&copy]);
    // One that is about to commit, and one whose producer died before it began.
    let go_on = Arc::new(Notify::new());
    let paying = scene.pays("o-1", &go_on);
    let identity = in_either!(&scene.pool, pool => Fence::open(pool).await.unwrap().identity());
    let orphan = NewMessage {
        fence: identity.as_bytes().to_vec(),
        ..message(TOPIC)
    };
    let prepared = scene.world.raw(SHOP).prepare(&orphan).await;
    prepared.expect("a prepare is accepted");

    let asked = |messages: &[books::Message]| {
        messages.len() == 2 && messages.iter().all(|message| message.checks >= 2)
    };
    for asked in scene.until("both are checked twice", asked).await {
        let name = name_of(&asked.id);
        assert_eq!(asked.state, "PREPARED", "{name}");
        let checks = scene.checks(&asked.id).await;
        assert!(checks.iter().all(|a| a == "UNKNOWN"), "{name}: {checks:?}");
    }
    let fenced = "SELECT count(*) FROM handfast_fence";
    assert_eq!(number(&copy, fenced).await, 0, "the copy was not touched");
    go_on.notify_one();
    let outcome = paying.await.unwrap().unwrap();
    let Outcome::Committed(id) = outcome else {
        panic!("{outcome:?}");
    };
    stays(
        "the orphan is PREPARED",
        Duration::from_secs(1),
        async || {
            let messages = scene.world.books().await.messages;
            let found = messages.iter().find(|m| m.id == orphan.id).unwrap();
            (found.state == "PREPARED")
                .then_some(())
                .ok_or_else(|| found.state.clone())
        },
    )
    .await;

    // Where its database answers too, it is told from the other.
    let (stop, task) = wrong;
    drop(stop);
    task.await.unwrap();
    let _serving = scene.status_server(&[&copy, &scene.pool]);
    scene
        .until("its own database cancels the orphan", |messages| {
            messages
                .iter()
                .any(|m| m.id == orphan.id && is(m, "CANCELLED", "CHECK"))
        })
        .await;
    assert_eq!(number(&copy, fenced).await, 0);
    scene.only_this_was_paid(id).await;
}
