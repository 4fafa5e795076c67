//! All of it together: a folder, an address, a configuration, and the processes.

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
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::books::{Books, number};
use crate::clients::{Payments, Raw};
use crate::config::Config;
use crate::process::Process;
use crate::wait::eventually;

/// What a merchant and its users have at first, in minor units.
pub const BALANCE: i64 = 1_000_000;
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
const PAYMENT_PORT: u16 = 7410;
const STATUS_PORT: u16 = 7411;

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

/// A folder, an address, and what runs there. Dropped, it kills what runs and removes the
/// folder.
#[derive(Debug)]
pub struct World {
    /// What the service is told at its next start.
    pub config: Config,
    /// After this long, payment answers PROCESSING.
    pub pay_deadline_ms: u64,
    /// Where the service keeps its database, if not in the world's folder.
    pub service_file: Option<PathBuf>,
    /// What the environment tells the service; it wins over the configuration.
    pub service_environment: BTreeMap<String, String>,
    // Before the folder, so that everything is dead before it is removed.
    running: BTreeMap<String, Process>,
    folder: TempDir,
    host: Ipv4Addr,
    /// The sum of what the accounts were opened with.
    pub(crate) opened: i64,
}

impl World {
    /// A world in which nothing runs yet and which knows payment, accounting and points.
    pub async fn new() -> Self {
        let host = own_address();
        let config = Config::empty()
            .producer("payment", SocketAddr::from((host, STATUS_PORT)))
            .topic("payment.completed")
            .subscription("accounting", "payment.completed")
            .subscription("points", "payment.completed");
        let mut world = Self::with(host, config);
        world.open_account(USER, BALANCE).await;
        world.open_account(POOR, 0).await;
        world
    }

    /// Opens an account at payment.
    pub async fn open_account(&mut self, name: &str, balance: i64) {
        let pool = payment::open_database(&self.file("payment.db"))
            .await
            .expect("payment's database opens");
        payment::open_account(&pool, name, balance)
            .await
            .expect("an account opens");
        pool.close().await;
        self.opened += balance;
    }

    /// A world of which the service knows only what `config` says.
    pub fn bare(config: Config) -> Self {
        Self::with(own_address(), config)
    }

    fn with(host: Ipv4Addr, config: Config) -> Self {
        Self {
            config,
            pay_deadline_ms: 5_000,
            service_file: None,
            service_environment: BTreeMap::new(),
            running: BTreeMap::new(),
            folder: TempDir::with_prefix("handfast-test-").expect("a temporary folder"),
            host,
            opened: 0,
        }
    }

    /// A world with everything running.
    pub async fn running() -> Self {
        let mut world = Self::new().await;
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
        self.folder.path().join(name)
    }

    /// An address of this world; ports below 8000 are the four parties'.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.host, port))
    }

    /// Where the service is.
    pub fn service_url(&self) -> String {
        format!("http://{}", self.address(SERVICE_PORT))
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
        let mut command = self.command(party);
        if !armed.is_empty() {
            command.env(ENVIRONMENT, armed);
        }
        self.spawn(party.name(), command);
        match party {
            Party::Service => self.until_serving().await,
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
        self.take(party.name()).kill().await;
    }

    /// Stops a party with SIGTERM; it must end with 0.
    pub async fn stop(&mut self, party: Party) {
        self.take(party.name()).stop().await;
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
        let database = self.database_file(party.name());
        let mut command = match party {
            Party::Service => {
                let file = self.file("handfast.toml");
                let listen = self.address(SERVICE_PORT).to_string();
                let text = self.config.text(&listen, &database.display().to_string());
                std::fs::write(&file, text).expect("the configuration can be written");
                let mut command = Command::new(handfast());
                command.arg("serve").arg("--config").arg(file);
                command.envs(&self.service_environment);
                command
            }
            Party::Payment | Party::Accounting | Party::Points => {
                let mut command = Command::new(handfast());
                command.arg("demo-party").arg(party.name());
                let variable = |name: &str| format!("{}_{name}", party.name().to_uppercase());
                command
                    .env(variable("SERVICE"), self.service_url())
                    .env(variable("DATABASE"), database)
                    .env(variable("HANDLER_TIMEOUT_MS"), "1500");
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
            .current_dir(self.folder.path());
        command
    }

    async fn until_serving(&mut self) {
        let mut health = HealthClient::new(self.channel(&self.service_url()));
        let process = self.running.get_mut("service").expect("it was started");
        eventually("SERVING", START, async || {
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
        let file = self.file(&format!("{}.db", party.name()));
        let process = self.running.get_mut(party.name()).expect("it was started");
        let inbox = "SELECT count(*) FROM sqlite_schema WHERE name = 'handfast_inbox'";
        eventually(
            format!("{} has its inbox", party.name()),
            START,
            async || {
                if process.ended().is_some() {
                    return Ok(());
                }
                if !file.exists() {
                    return Err("there is no database".to_owned());
                }
                let db = look_at(&file).await;
                let tables = number(&db, inbox).await;
                db.close().await;
                (tables == 1)
                    .then_some(())
                    .ok_or_else(|| "there is no inbox".to_owned())
            },
        )
        .await;
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

    // === Databases ===

    /// The database file of a party or program of this name.
    pub fn database_file(&self, name: &str) -> PathBuf {
        match &self.service_file {
            Some(file) if name == Party::Service.name() => file.clone(),
            _ => self.file(&format!("{name}.db")),
        }
    }

    /// The database of a party, as others may look at it while it runs.
    pub async fn database(&self, name: &str) -> SqlitePool {
        look_at(&self.database_file(name)).await
    }

    /// What all databases say now.
    pub async fn books(&self) -> Books {
        Books::read(self).await
    }

    /// Waits until nothing is on its way any more: no payment unfinished, no message
    /// undecided, no delivery open; and returns what the databases then say.
    pub async fn drained(&self) -> Books {
        eventually("everything is finished", DRAIN, async || {
            let books = self.books().await;
            match books.unfinished() {
                None => Ok(books),
                Some(what) => Err(what),
            }
        })
        .await
    }
}

/// Opens a file that another process writes to, only to look.
pub async fn look_at(path: &Path) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(Duration::from_secs(5));
    SqlitePoolOptions::new()
        .max_connections(1)
        .connect_with(options)
        .await
        .unwrap_or_else(|error| panic!("cannot look at {}: {error}", path.display()))
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
