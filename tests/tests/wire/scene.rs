//! The service on PostgreSQL and RabbitMQ, and the Python programs in front of it: a shop that
//! pays orders, its status server, and accounting, which books what was paid.

use std::collections::BTreeMap;
use std::time::Duration;

use handfast_proto::v1::{DeliveryRow, MessageStatus, ShowMessageRequest, ShowMessageResponse};
use handfast_tests::process::Process;
use handfast_tests::{Config, Engines, Party, World, eventually};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::document::schemas;
use crate::python::Python;
use crate::scratch::{Database, Deployment};

/// The one topic.
const TOPIC: &str = "payment.completed";
/// The one subscription.
pub(crate) const ACCOUNTING: &str = "accounting";
/// An account that exists from the beginning.
pub(crate) const ADA: &str = "ada";
const STATUS_PORT: u16 = 8411;

/// What is to happen has happened after this time, also if it takes a few tries.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

const SHOP: &str = "
    CREATE TABLE payment (
        order_id text PRIMARY KEY, message_id uuid NOT NULL, account text NOT NULL,
        amount bigint NOT NULL
    );";
/// An effect that happens twice leaves two rows here: nothing but the inbox prevents it.
const BOOKS: &str = "
    CREATE TABLE account (
        name text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0,
        closed boolean NOT NULL DEFAULT false
    );
    CREATE TABLE booking (
        message_id uuid NOT NULL, order_id text NOT NULL, account text NOT NULL,
        amount bigint NOT NULL
    );
    INSERT INTO account (name) VALUES ('ada');";

/// All of it. Dropped from top to bottom: who uses a database ends before it goes.
pub(crate) struct Scene {
    programs: BTreeMap<&'static str, Process>,
    pub(crate) world: World,
    runs: u32,
    pub(crate) shop: Database,
    pub(crate) books: Database,
    // Only the service uses these.
    _store: Database,
    pub(crate) deployment: Deployment,
}

impl Scene {
    /// Everything is there, and nothing runs.
    pub(crate) async fn new() -> Self {
        let (fence, inbox) = schemas();
        let shop = Database::with(&(fence + SHOP)).await;
        let books = Database::with(&(inbox + BOOKS)).await;
        let store = Database::with("").await;
        let deployment = Deployment::new(&[ACCOUNTING, "guarded"]);
        let mut world = World::bare(Engines::Embedded, Config::empty());
        world.config = Config::empty()
            .producer("payment", world.address(STATUS_PORT))
            .topic(TOPIC)
            .subscription(ACCOUNTING, TOPIC);
        let told = [
            ("HANDFAST_STORE", store.url.clone()),
            ("HANDFAST_BROKER", Deployment::url()),
            ("HANDFAST_DEPLOYMENT", deployment.name.clone()),
        ];
        world.service_environment = told.map(|(name, value)| (name.to_owned(), value)).into();
        Self {
            programs: BTreeMap::new(),
            world,
            runs: 0,
            shop,
            books,
            _store: store,
            deployment,
        }
    }

    /// The service, the status server and accounting run.
    pub(crate) async fn running() -> Self {
        let mut scene = Self::new().await;
        scene.world.start(Party::Service).await;
        scene.start_status();
        scene.start_accounting("");
        scene
    }

    /// Starts the status server of the shop.
    pub(crate) fn start_status(&mut self) {
        let address = self.world.address(STATUS_PORT).to_string();
        let mut command = Python::ready().program("status.py");
        command.args(["--listen", &address, "--database", &self.shop.url]);
        self.start("status", command);
    }

    /// Starts accounting; it ends as by a power failure at the first moment of this name.
    pub(crate) fn start_accounting(&mut self, die_when: &str) {
        let mut command = Python::ready().program("consumer.py");
        command
            .args(["--amqp", &Deployment::url()])
            .args(["--deployment", &self.deployment.name])
            .args(["--subscription", ACCOUNTING])
            .args(["--database", &self.books.url])
            .env("DIE_WHEN", die_when);
        self.start(ACCOUNTING, command);
    }

    fn start(&mut self, name: &'static str, command: std::process::Command) {
        let log = self.world.file(&format!("{name}.log"));
        let before = self
            .programs
            .insert(name, Process::start(name, command, &log));
        assert!(before.is_none(), "{name} was running already");
    }

    /// Waits until a program was killed by itself.
    pub(crate) async fn was_killed(&mut self, name: &str) {
        let process = self.programs.remove(name).expect("it runs");
        process.died_of(Signal::SIGKILL, PATIENCE).await;
    }

    /// Stops a program in good order.
    pub(crate) async fn stop(&mut self, name: &str) {
        self.programs.remove(name).expect("it runs").stop().await;
    }

    /// The shop pays these orders for `account`; with more words for its program. Returns what
    /// it said of each.
    pub(crate) async fn pays(
        &mut self,
        account: &str,
        orders: &[&str],
        words: &[&str],
    ) -> BTreeMap<String, String> {
        self.runs += 1;
        let handfast = self.world.service_url().replace("http://", "");
        let mut command = Python::ready().program("producer.py");
        command
            .args(["--handfast", &handfast, "--database", &self.shop.url])
            .args(["--account", account])
            .args(words)
            .args(orders);
        let log = self.world.file(&format!("producer-{}.log", self.runs));
        let mut process = Process::start("producer", command, &log);
        let ended = process.end(PATIENCE).await;
        let said = std::fs::read_to_string(log).unwrap();
        assert!(ended.success(), "the producer ended with {ended}: {said}");
        let of = |order: &str| {
            let line = said
                .lines()
                .find_map(|line| line.strip_prefix(&format!("{order} ")));
            line.unwrap_or_else(|| panic!("nothing was said of {order}: {said}"))
                .to_owned()
        };
        orders
            .iter()
            .map(|order| ((*order).to_owned(), of(order)))
            .collect()
    }

    /// Pays one order, and returns its message.
    pub(crate) async fn pays_one(&mut self, account: &str, order: &str, words: &[&str]) -> Uuid {
        let said = self.pays(account, &[order], words).await;
        assert_eq!(said[order], "PAID");
        self.message_of(order).await
    }

    /// The message of a payment.
    pub(crate) async fn message_of(&self, order: &str) -> Uuid {
        sqlx::query_scalar("SELECT message_id FROM payment WHERE order_id = $1")
            .bind(order)
            .fetch_one(&self.shop.pool)
            .await
            .unwrap()
    }

    /// What the shop sees of a message.
    pub(crate) async fn status(&self, message: Uuid) -> MessageStatus {
        let found = self.world.raw("payment").get(message.as_bytes()).await;
        found.unwrap_or_else(|| panic!("the service does not know {message}"))
    }

    /// What operators see of a message.
    pub(crate) async fn shown(&self, message: Uuid) -> ShowMessageResponse {
        let request = ShowMessageRequest {
            message_id: message.as_bytes().to_vec(),
            with_body: false,
        };
        self.world
            .console()
            .show_message(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Waits until this happened to a message's delivery, as its timeline names it.
    pub(crate) async fn happened(&self, message: Uuid, kind: &str) {
        eventually(format!("{message} is {kind}"), PATIENCE, async || {
            let shown = self.shown(message).await;
            let kinds: Vec<_> = shown
                .timeline
                .iter()
                .map(|entry| entry.kind.as_str())
                .collect();
            kinds
                .contains(&kind)
                .then_some(())
                .ok_or_else(|| format!("{kinds:?}"))
        })
        .await;
    }

    /// Waits until the one delivery of a message is like this, and returns it.
    pub(crate) async fn delivery(
        &self,
        message: Uuid,
        what: &str,
        is: impl Fn(&DeliveryRow) -> bool,
    ) -> DeliveryRow {
        eventually(
            format!("{message} is {what}"),
            PATIENCE,
            async || match &self.shown(message).await.deliveries[..] {
                [delivery] if is(delivery) => Ok(delivery.clone()),
                other => Err(format!("{other:?}")),
            },
        )
        .await
    }

    /// What was booked, in order: order and amount.
    pub(crate) async fn booked(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT order_id, amount FROM booking ORDER BY order_id")
            .fetch_all(&self.books.pool)
            .await
            .unwrap()
    }

    /// What was paid, in order: order and amount.
    pub(crate) async fn paid(&self) -> Vec<(String, i64)> {
        sqlx::query_as("SELECT order_id, amount FROM payment ORDER BY order_id")
            .fetch_all(&self.shop.pool)
            .await
            .unwrap()
    }

    /// Waits until exactly what was paid is booked, each once.
    pub(crate) async fn everything_is_booked(&self) {
        let paid = self.paid().await;
        eventually("what was paid is booked", PATIENCE, async || {
            let booked = self.booked().await;
            (booked == paid)
                .then_some(())
                .ok_or_else(|| format!("{booked:?}, not {paid:?}"))
        })
        .await;
    }

    /// A number from the books.
    pub(crate) async fn counted(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql)
            .fetch_one(&self.books.pool)
            .await
            .unwrap()
    }

    /// Changes the books by hand.
    pub(crate) async fn change(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.books.pool).await.unwrap();
    }
}
