//! All of it together: a folder, databases, an address, a configuration, and the processes.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use handfast_fail_points::{ENVIRONMENT, Point};
use handfast_proto::v1::console_client::ConsoleClient;
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use handfast_proto::v1::messages_client::MessagesClient;
use nix::sys::signal::Signal;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::books::Books;
use crate::clients::{Payments, Raw};
use crate::config::{Config, STEP_MS};
use crate::database::{Database, number};
use crate::home::{Engines, Home, Servers};
use crate::link::{Link, host_of};
use crate::process::Process;
use crate::proxy::Proxy;
use crate::wait::eventually;

/// What a merchant and its users have at first, in minor units.
pub const BALANCE: i64 = 100_000_000;
/// The user whom the world makes rich.
pub const USER: &str = "ada";
/// A user with an account and nothing in it.
pub const POOR: &str = "bob";

/// A start takes this long at most.
const START: Duration = Duration::from_secs(15);
/// An armed point is reached within this time, or the test has missed it.
const REACH: Duration = Duration::from_secs(20);
/// After a fault has healed, everything is finished within this time.
const DRAIN: Duration = Duration::from_secs(30);

const SERVICE_PORT: u16 = 7400;
const REPLICA_PORT: u16 = 7401;
const PAYMENT_PORT: u16 = 7410;
pub(crate) const STATUS_PORT: u16 = 7411;

/// One of the four processes of a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// The message service.
    Service,
    /// Who produces `payment.completed`.
    Payment,
    /// Who books it.
    Accounting,
    /// Who rewards it.
    Points,
}

impl Party {
    /// All four, in the order in which they are started.
    pub const ALL: [Self; 4] = [Self::Service, Self::Payment, Self::Accounting, Self::Points];

    /// Its name: of its database, of its log, of its subcommand.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Payment => "payment",
            Self::Accounting => "accounting",
            Self::Points => "points",
        }
    }
}

/// A folder, databases, an address, and what runs there. Dropped, it kills what runs and removes
/// what it made.
#[derive(Debug)]
pub struct World {
    /// What the service is told at its next start.
    pub config: Config,
    /// Payment knows two addresses of Handfast at its next start, the service's and a replica's.
    pub replicated: bool,
    /// What the next party is started from; first the tested program.
    pub program: PathBuf,
    /// After this long, payment answers PROCESSING.
    pub pay_deadline_ms: u64,
    /// What the environment tells the service; it wins over the configuration.
    pub service_environment: BTreeMap<String, String>,
    // Before the home, so that everything is dead before it is removed.
    running: BTreeMap<String, Process>,
    /// The proxies on links.
    pub(crate) detours: BTreeMap<Link, SocketAddr>,
    home: Home,
    /// The servers that are this world's own.
    pub servers: Servers,
    host: Ipv4Addr,
    /// The sum of what the accounts were opened with.
    pub(crate) opened: i64,
}

impl World {
    /// A world in which nothing runs yet and which knows payment, accounting and points.
    pub async fn new(engines: Engines) -> Self {
        Self::with_servers(engines, Servers::default()).await
    }

    /// The same on servers of its own.
    pub async fn with_servers(engines: Engines, servers: Servers) -> Self {
        let mut world = Self::bare_with_servers(engines, servers, Config::empty());
        world.config = world.usual_config();
        world.open_accounts([(USER, BALANCE), (POOR, 0)]).await;
        world
    }

    /// Opens an account at payment.
    pub async fn open_account(&mut self, name: &str, balance: i64) {
        self.open_accounts([(name, balance)]).await;
    }

    async fn open_accounts<const N: usize>(&mut self, accounts: [(&str, i64); N]) {
        self.home.make("payment").await;
        let database = payment::Database::parse(&self.home.address("payment"));
        let database = database.expect("payment's database");
        self.opened += accounts.iter().map(|(_, balance)| balance).sum::<i64>();
        let accounts = accounts.map(|(name, balance)| (name.to_owned(), balance));
        payment::open_accounts(&database, accounts)
            .await
            .expect("accounts open");
    }

    /// A world of which the service knows only what `config` says.
    pub fn bare(engines: Engines, config: Config) -> Self {
        Self::bare_with_servers(engines, Servers::default(), config)
    }

    /// The same on servers of its own.
    pub fn bare_with_servers(engines: Engines, servers: Servers, config: Config) -> Self {
        Self {
            config,
            replicated: false,
            program: handfast(),
            pay_deadline_ms: 5_000,
            service_environment: BTreeMap::new(),
            running: BTreeMap::new(),
            detours: BTreeMap::new(),
            home: Home::new(engines, &servers),
            servers,
            host: own_address(),
            opened: 0,
        }
    }

    pub(crate) fn usual_config(&self) -> Config {
        self.config_of_payment(&format!("schedule_ms = [{STEP_MS}]"))
    }

    /// Payment, accounting with these lines, and points.
    pub fn config_of_payment(&self, accounting: &str) -> Config {
        Config::empty()
            .producer("payment", self.status_address())
            .topic("payment.completed")
            .subscription_with("accounting", "payment.completed", accounting)
            .subscription("points", "payment.completed")
    }

    /// What it runs on.
    pub const fn engines(&self) -> Engines {
        self.home.engines()
    }

    /// A world with everything running.
    pub async fn running(engines: Engines) -> Self {
        let mut world = Self::new(engines).await;
        world.start_all().await;
        world
    }

    /// Starts whatever of the four does not run.
    pub async fn start_all(&mut self) {
        for party in Party::ALL {
            if !self.running.contains_key(party.name()) {
                self.start(party).await;
            }
        }
    }

    /// A file in the world's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.home.file(name)
    }

    /// An address of this world; ports below 8000 are the four parties'.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.host, port))
    }

    /// Where the service is.
    pub fn service_url(&self) -> String {
        format!("http://{}", self.address(SERVICE_PORT))
    }

    /// Where the service and its replica are, as a producer is told.
    pub fn replicated_url(&self) -> String {
        format!("{},{}", self.service_url(), self.replica_url())
    }

    /// Where the service's replica is.
    pub fn replica_url(&self) -> String {
        format!("http://{}", self.address(REPLICA_PORT))
    }

    /// Where the database of a party is.
    pub(crate) fn database_url(&self, party: Party) -> String {
        self.home.address(party.name())
    }

    /// A proxy on a service's way to RabbitMQ, and the URL of RabbitMQ by way of it.
    pub async fn proxied_rabbitmq(&self) -> (Proxy, String) {
        let (url, _) = self.rabbitmq();
        let proxy = Proxy::start(host_of(&url)).await;
        let url = url.replace(&host_of(&url).to_string(), &proxy.address().to_string());
        (proxy, url)
    }

    /// Where payment is.
    pub fn payment_url(&self) -> String {
        format!("http://{}", self.address(PAYMENT_PORT))
    }

    /// Where a second payment is; see [`Self::second`].
    pub fn second_payment_url(&self) -> String {
        format!("http://{}", self.address(PAYMENT_PORT + 100))
    }

    // === Processes ===

    /// Starts one party and waits until it serves.
    pub async fn start(&mut self, party: Party) {
        self.start_armed(party, "").await;
    }

    /// Starts one party with armed fail points, `name=action;…`, and waits until it serves or
    /// has died.
    pub async fn start_armed(&mut self, party: Party, armed: &str) {
        self.home.make(party.name()).await;
        let mut command = self.command(party);
        self.detoured(party, &mut command);
        if !armed.is_empty() {
            command.env(ENVIRONMENT, armed);
        }
        self.spawn(party.name(), command);
        match party {
            Party::Service => self.until_serving(party.name(), SERVICE_PORT).await,
            Party::Payment => self.until_listening(party, PAYMENT_PORT).await,
            Party::Accounting | Party::Points => self.until_inbox(party).await,
        }
        // Only what was armed may have died already.
        if armed.is_empty() && !self.runs(party.name()) {
            panic!("{} ended at its start", party.name());
        }
    }

    /// Starts one party so that it aborts when it passes `point` for the `nth` time.
    pub async fn start_to_die(&mut self, party: Party, point: Point, nth: u32) {
        self.start_armed(party, &format!("{point}=abort@{nth}"))
            .await;
    }

    /// The command of a second process of a party, on other ports and the same database.
    pub fn second(&self, party: Party) -> Command {
        let mut command = self.command(party);
        command
            .env(
                "PAYMENT_LISTEN",
                self.address(PAYMENT_PORT + 100).to_string(),
            )
            .env(
                "PAYMENT_STATUS_LISTEN",
                self.address(STATUS_PORT + 100).to_string(),
            );
        command
    }

    /// The command of another message service on the same servers.
    pub fn replica(&self) -> Command {
        let mut command = self.command(Party::Service);
        let listen = self.address(REPLICA_PORT).to_string();
        command.arg("--listen").arg(listen);
        command
    }

    /// Starts another message service on the same servers, of this name, and waits until it serves.
    pub async fn start_replica(&mut self, name: &str) {
        self.start_replica_with(name, &[]).await;
    }

    /// The same with more arguments of `serve`.
    pub async fn start_replica_with(&mut self, name: &str, arguments: &[&str]) {
        let mut command = self.replica();
        command.args(arguments);
        self.spawn(name, command);
        self.until_serving(name, REPLICA_PORT).await;
        assert!(self.runs(name), "{name} ended at its start");
    }

    /// Kills the process of this name with SIGKILL.
    pub async fn kill_process(&mut self, name: &str) {
        self.take(name).kill().await;
    }

    /// Starts another program in this world; it dies with it.
    pub fn spawn(&mut self, name: &str, command: Command) {
        let log = self.file(&format!("{name}.log"));
        let process = Process::start(name, command, &log);
        let before = self.running.insert(name.to_owned(), process);
        assert!(before.is_none(), "{name} was running already");
    }

    /// The process of this name, to signal it.
    pub fn process(&mut self, name: &str) -> &mut Process {
        self.running
            .get_mut(name)
            .unwrap_or_else(|| panic!("{name} does not run"))
    }

    fn take(&mut self, name: &str) -> Process {
        self.running
            .remove(name)
            .unwrap_or_else(|| panic!("{name} does not run"))
    }

    /// Waits until a program has aborted, and forgets it.
    pub async fn aborted(&mut self, name: &str) {
        let process = self.take(name);
        process.died_of(Signal::SIGABRT, REACH).await;
    }

    /// Kills a party with SIGKILL.
    pub async fn kill(&mut self, party: Party) {
        self.kill_process(party.name()).await;
    }

    /// Stops a party with SIGTERM; it must end with 0.
    pub async fn stop(&mut self, party: Party) {
        self.stop_process(party.name()).await;
    }

    /// Stops the process of this name with SIGTERM; it must end with 0.
    pub async fn stop_process(&mut self, name: &str) {
        self.take(name).stop().await;
    }

    /// Kills and starts again.
    pub async fn crash(&mut self, party: Party) {
        self.kill(party).await;
        self.start(party).await;
    }

    /// Suspends a party.
    pub fn freeze(&mut self, party: Party) {
        self.process(party.name()).signal(Signal::SIGSTOP);
    }

    /// Lets a suspended party go on.
    pub fn thaw(&mut self, party: Party) {
        self.process(party.name()).signal(Signal::SIGCONT);
    }

    /// Waits until a party has died at the fail point it was armed with. If it lives on, the
    /// point was never reached and the test proves nothing, so it fails.
    pub async fn died_at(&mut self, party: Party, point: Point) {
        let process = self.take(party.name());
        eprintln!("{} is to die at {point}", party.name());
        process.died_of(Signal::SIGABRT, REACH).await;
    }

    /// True while a party of this name runs.
    pub fn runs(&mut self, name: &str) -> bool {
        self.running
            .get_mut(name)
            .is_some_and(|process| process.ended().is_none())
    }

    fn command(&self, party: Party) -> Command {
        let database = self.home.address(party.name());
        let mut command = match party {
            Party::Service => {
                let file = self.file("handfast.toml");
                let listen = self.address(SERVICE_PORT).to_string();
                let text = self.config.text(&listen, &self.home);
                std::fs::write(&file, text).expect("the configuration can be written");
                let mut command = Command::new(&self.program);
                command.arg("serve").arg("--config").arg(file);
                command.envs(&self.service_environment);
                command
            }
            Party::Payment | Party::Accounting | Party::Points => {
                let mut command = Command::new(&self.program);
                command.arg("demo-party").arg(party.name());
                let variable = |name: &str| format!("{}_{name}", party.name().to_uppercase());
                let service = match self.replicated {
                    true => self.replicated_url(),
                    false => self.service_url(),
                };
                command
                    .env(variable("SERVICE"), service)
                    .env(variable("DATABASE"), database)
                    .env(variable("HANDLER_TIMEOUT_MS"), "1500");
                match self.home.production() {
                    None => command.env(variable("SOURCE"), self.service_url()),
                    Some(production) => command
                        .env(variable("SOURCE"), &production.amqp)
                        .env(variable("DEPLOYMENT"), production.deployment()),
                };
                command
            }
        };
        command
            .env("PAYMENT_LISTEN", self.address(PAYMENT_PORT).to_string())
            .env(
                "PAYMENT_STATUS_LISTEN",
                self.address(STATUS_PORT).to_string(),
            )
            .env("PAYMENT_JOB_INTERVAL_MS", "300")
            .env("PAYMENT_PAY_DEADLINE_MS", self.pay_deadline_ms.to_string())
            .current_dir(self.home.folder());
        command
    }

    async fn until_serving(&mut self, name: &str, port: u16) {
        let url = format!("http://{}", self.address(port));
        let mut health = HealthClient::new(self.channel(&url));
        let process = self.running.get_mut(name).expect("it was started");
        eventually(format!("{name} is SERVING"), START, async || {
            if process.ended().is_some() {
                return Ok(());
            }
            match health.check(HealthCheckRequest::default()).await {
                Ok(reply) if reply.get_ref().status() == ServingStatus::Serving => Ok(()),
                Ok(reply) => Err(format!("{:?}", reply.get_ref().status())),
                Err(status) => Err(status.to_string()),
            }
        })
        .await;
    }

    async fn until_listening(&mut self, party: Party, port: u16) {
        let address = self.address(port);
        let process = self.running.get_mut(party.name()).expect("it was started");
        eventually(format!("{} listens", party.name()), START, async || {
            if process.ended().is_some() {
                return Ok(());
            }
            let connected = tokio::net::TcpStream::connect(address).await;
            connected.map(drop).map_err(|error| error.to_string())
        })
        .await;
    }

    /// A consumer listens to nobody; it makes its inbox last of all before it consumes.
    async fn until_inbox(&mut self, party: Party) {
        let (home, running) = (&self.home, &mut self.running);
        let process = running.get_mut(party.name()).expect("it was started");
        eventually(
            format!("{} has its inbox", party.name()),
            START,
            async || {
                if process.ended().is_some() {
                    return Ok(());
                }
                has(home, party.name(), "handfast_inbox")
                    .await
                    .then_some(())
                    .ok_or_else(|| "there is no inbox".to_owned())
            },
        )
        .await;
    }

    /// Whether a party has ever consumed, by its database.
    pub async fn has_inbox(&self, name: &str) -> bool {
        has(&self.home, name, "handfast_inbox").await
    }

    // === Clients ===

    /// A connection that is made when it is first used, and again whenever it was lost.
    pub fn channel(&self, url: &str) -> Channel {
        Endpoint::from_shared(url.to_owned())
            .expect("a URL")
            .connect_timeout(Duration::from_secs(2))
            .connect_lazy()
    }

    /// Who asks payment to pay.
    pub fn payments(&self) -> Payments {
        Payments::at(self.channel(&self.payment_url()))
    }

    /// A producer of this name that speaks the contract by hand.
    pub fn raw(&self, producer: &str) -> Raw {
        Raw::new(self.messages(), producer)
    }

    /// The verbs of producers.
    pub fn messages(&self) -> MessagesClient<Channel> {
        MessagesClient::new(self.channel(&self.service_url()))
    }

    /// The verbs of consumers.
    pub fn deliveries(&self) -> DeliveriesClient<Channel> {
        DeliveriesClient::new(self.channel(&self.service_url()))
    }

    /// What operators see.
    pub fn console(&self) -> ConsoleClient<Channel> {
        ConsoleClient::new(self.channel(&self.service_url()))
    }

    // === Databases and queues ===

    /// Keeps the service's database in another file than the world's folder.
    pub fn keep_service_in(&mut self, file: PathBuf) {
        self.home.keep_service_in(file);
    }

    /// Lets the service reach RabbitMQ by this URL, as a user of its own or by a detour.
    pub fn connect_service_to(&mut self, amqp: String) {
        self.home.connect_service_to(amqp);
    }

    /// Where a database of this name is, as programs are told.
    pub fn database_address(&self, name: &str) -> String {
        self.home.address(name)
    }

    /// Makes a database of this name for a program that is not a party.
    pub async fn make_database(&self, name: &str) {
        self.home.make(name).await;
    }

    /// The database of a party, as others may look at it while it runs.
    pub async fn database(&self, name: &str) -> Database {
        let database = self.database_if_any(name).await;
        database.unwrap_or_else(|| panic!("{name} has no database"))
    }

    /// The same, if it was made.
    pub async fn database_if_any(&self, name: &str) -> Option<Database> {
        self.home.open(name).await
    }

    /// Where RabbitMQ is, and what every name of this world in it begins with.
    ///
    /// # Panics
    /// In a world without RabbitMQ.
    pub fn rabbitmq(&self) -> (String, String) {
        let production = self.home.production().expect("a world with RabbitMQ");
        (production.amqp.clone(), production.deployment())
    }

    /// Waits until every delivery is CONSUMED, without reading what there is of them.
    pub async fn until_all_consumed(&self, within: Duration) {
        let db = self.database("service").await;
        eventually("everything is consumed", within, async || {
            let open = "SELECT count(*) FROM delivery WHERE state <> 'CONSUMED'";
            let open = number(&db, open).await;
            (open == 0)
                .then_some(())
                .ok_or_else(|| format!("{open} are not"))
        })
        .await;
        db.close().await;
    }

    /// What all databases say now.
    pub async fn books(&self) -> Books {
        Books::read(self).await
    }

    /// Waits until nothing is on its way any more: no payment unfinished, no message
    /// undecided, no delivery open; and returns what the databases then say.
    pub async fn drained(&self) -> Books {
        self.drained_within(DRAIN).await
    }

    /// The same within another time.
    pub async fn drained_within(&self, time: Duration) -> Books {
        eventually("everything is finished", time, async || {
            let books = self.books().await;
            match books.unfinished() {
                None => Ok(books),
                Some(what) => Err(what),
            }
        })
        .await
    }
}

/// Whether the database of this name is there, with this table.
async fn has(home: &Home, name: &str, table: &str) -> bool {
    let Some(database) = home.open(name).await else {
        return false;
    };
    let has = database.has(table).await;
    database.close().await;
    has
}

/// The tested program: the one that `HANDFAST_BIN` names, or the one in the folder above the
/// test program's.
pub fn handfast() -> PathBuf {
    let path = match std::env::var_os("HANDFAST_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let test = std::env::current_exe().expect("a test knows its program");
            let debug = test.parent().and_then(Path::parent).expect("target/debug");
            debug.join("handfast")
        }
    };
    assert!(
        path.is_file(),
        "there is no program {}; run `cargo xtask test`, or `cargo build --workspace` first",
        path.display()
    );
    path
}

/// A loopback address that no other world of this machine has, so that ports are free without
/// asking: every world may use the same ones, and a restart finds them free again.
fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let world = NEXT.fetch_add(1, Ordering::Relaxed) % 250;
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let world = u8::try_from(world).expect("less than 250");
    // 127.0.0.1 is everybody's.
    Ipv4Addr::new(127, high, low, world + 2)
}
