//! `handfast demo`: payments while every process is killed, and then the sums.
//!
//! Four processes of this binary (service, payment, accounting, points) work on SQLite files
//! of their own, or on databases of their own in PostgreSQL and names of their own in RabbitMQ,
//! to which all connections are cut on the way. A plan drawn from a seed says what is asked of them and how each of them dies;
//! every death is SIGKILL or `abort` at a fail point. At the end, nothing that they said counts:
//! the numbers are read from their databases.
//!
//! Reading order: [`plan`], [`engines`], [`home`], [`party`], [`kill`], [`load`], [`audit`], [`verdict`],
//! [`report`].

mod audit;
mod engines;
mod home;
mod kill;
mod load;
mod party;
mod plan;
mod progress;
mod proxy;
mod report;
mod tally;
mod verdict;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use audit::Books;
use engines::Engines;
use home::Home;
use kill::{Crew, Stage};
use load::Answers;
use plan::{Plan, Role};
use progress::Progress;
use tally::Tally;
use verdict::Verdict;

pub(crate) use engines::Wanted;
pub(crate) use party::{SUBCOMMAND, watch_parent};
pub(crate) use plan::MAX_PAYMENTS;

/// If nothing moves for so long, it is over, and the sums tell what is missing.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often the databases are looked at while everything is delivered.
const LOOK: Duration = Duration::from_millis(50);
/// Reading everything takes less, however much there is; a server that stands still takes longer.
const READ_WITHIN: Duration = Duration::from_secs(120);
/// After the load, an armed abort is waited for at least this long: what it needs may still
/// be on its way though nothing is unfinished.
const LAST_CALL_AFTER: Duration = Duration::from_millis(300);

/// What is asked for.
#[derive(Clone)]
pub(crate) struct Options {
    /// How many orders are to be paid.
    pub(crate) payments: u64,
    /// Repeats a plan; drawn by chance if it is missing.
    pub(crate) seed: Option<u64>,
    /// What it works on.
    pub(crate) wanted: Wanted,
    /// Where the files stay.
    pub(crate) keep: Option<PathBuf>,
    /// The result as one JSON object.
    pub(crate) json: bool,
}

/// Why the demo could not be carried through. Each is one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot use the folder {}: {source}; name another with --keep DIR", path.display())]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "cannot use the folder of {}: it holds files of a former run; remove them or name an \
         empty folder with --keep DIR", file.display()
    )]
    UsedFolder { file: PathBuf },
    #[error("cannot find three free ports between 15000 and 30000; end what listens there")]
    NoPort,
    #[error(
        "cannot make databases for the demo: {0}; see that the server of --store runs and lets us create databases"
    )]
    Postgres(sqlx::Error),
    #[error("cannot use RabbitMQ: {0}; see that the server of --broker runs and lets us in")]
    RabbitMq(String),
    #[error("cannot make the accounts of payment: {0}")]
    Accounts(#[from] payment::Error),
    #[error("cannot read the address of payment's database: {0}")]
    Database(String),
    #[error("cannot start {role}: {source}")]
    Start { role: Role, source: std::io::Error },
    #[error("cannot wait for {role}: {source}")]
    Wait { role: Role, source: std::io::Error },
    #[error("{role} ended, which was not planned ({status}); it said last: {said}")]
    Ended {
        role: Role,
        status: ExitStatus,
        said: String,
    },
    #[error("{role} died, which was not planned: {how}")]
    Unplanned { role: Role, how: &'static str },
    #[error("{role} was asked to stop and still ran after {waited_s} s")]
    NotStopped { role: Role, waited_s: u64 },
    #[error("cannot ask for payments: {0}")]
    Client(tonic::transport::Error),
    #[error("payment refuses the request for {order}: {status}")]
    Request {
        order: String,
        status: Box<tonic::Status>,
    },
    #[error("a task of the demo has failed: {0}")]
    Task(String),
    #[error("cannot read the databases: {0}")]
    Audit(sqlx::Error),
    #[error("cannot write the result: {0}")]
    Write(std::io::Error),
    #[error("it does not add up ({first}); the same plan: {plan}")]
    DoesNotAddUp { first: String, plan: String },
}

/// Runs it from the first payment to the sums. When `interrupted` is ready, its children end,
/// its files go away, and the result is None.
pub(crate) async fn run<S>(
    options: Options,
    interrupted: impl Future<Output = S>,
) -> Result<Option<S>, Error> {
    let mut chance = StdRng::from_os_rng();
    // Small enough to be typed again.
    let seed = options
        .seed
        .unwrap_or_else(|| u64::from(chance.random::<u32>()));
    // The folder may be refused, so nothing is made on servers before it is there.
    let home = Home::make(options.keep.as_deref(), &mut chance)?;
    let engines = Engines::make(options.wanted, &mut chance).await?;
    let plan = Arc::new(Plan::draw(seed, options.payments, engines.is_production()));
    let home = Arc::new(home.on(engines));

    // From here on nothing returns before what was made is removed.
    let run = Run::new(&plan, &home);
    let mut crew = None;
    let told_and_done = async {
        tell(&report::opening(&plan, &home), options.json)?;
        run.carry_through(&mut crew).await
    };
    let outcome = tokio::select! {
        outcome = told_and_done => outcome.map(Ok),
        signal = interrupted => Ok(Err(signal)),
    };
    if let Some(crew) = crew {
        crew.end().await;
    }
    home.engines().remove().await;
    let (verdict, elapsed_s) = match outcome? {
        Ok(verdict) => verdict,
        Err(signal) => return Ok(Some(signal)),
    };

    if options.json {
        let object = report::object(&plan, &run.tally, &verdict, elapsed_s);
        print(&format!("{object}\n"))?;
    } else {
        print(&report::table(&plan, &run.tally, &verdict, elapsed_s))?;
        if home.is_kept() {
            print(&format!("The files are in {}.\n", home.path().display()))?;
        }
    }
    for complaint in &verdict.complaints {
        // As above.
        let _ = writeln!(std::io::stderr(), "{complaint}");
    }
    match verdict.complaints.first() {
        None => Ok(None),
        Some(first) => Err(Error::DoesNotAddUp {
            first: first.clone(),
            plan: plan.arguments(),
        }),
    }
}

/// One run, from the first process to the last.
struct Run {
    plan: Arc<Plan>,
    home: Arc<Home>,
    answers: Arc<Answers>,
    tally: Arc<Tally>,
    stage: Arc<watch::Sender<Stage>>,
}

impl Run {
    fn new(plan: &Arc<Plan>, home: &Arc<Home>) -> Self {
        Self {
            plan: Arc::clone(plan),
            home: Arc::clone(home),
            answers: Arc::new(Answers::none(plan)),
            tally: Arc::default(),
            stage: Arc::new(watch::channel(Stage::default()).0),
        }
    }

    /// Whatever it ends with, `crew` holds the processes that may still live.
    async fn carry_through(&self, crew: &mut Option<Crew>) -> Result<(Verdict, f64), Error> {
        let began = Instant::now();
        let progress = Progress::start(&self.tally, self.plan.orders.len(), began);
        self.home.write_config()?;
        self.open_accounts().await?;
        let crew = crew.insert(Crew::start(
            &self.home,
            &self.plan,
            &self.stage.subscribe(),
            &self.tally,
        ));
        let cutting = AbortOnDropHandle::new(tokio::spawn(cut_on_the_way(
            Arc::clone(&self.home),
            Arc::clone(&self.tally),
            self.stage.subscribe(),
            self.plan.orders.len() as u64,
        )));
        tokio::select! {
            loaded = load::run(
                &self.home,
                &self.plan,
                &self.answers,
                &self.tally,
                &self.stage,
            ) => loaded?,
            error = crew.failed() => return Err(error),
            () = self.standstill() => {}
        }
        drop(cutting);
        self.settle(crew).await?;
        crew.stop().await?;
        drop(progress);

        let verdict = within(READ_WITHIN, self.verdict()).await;
        let verdict = verdict.map_err(Error::Audit)?;
        Ok((verdict, began.elapsed().as_secs_f64()))
    }

    async fn verdict(&self) -> Result<Verdict, sqlx::Error> {
        let mut books = Books::open(&self.home).await?;
        let verdict = Verdict::reach(&mut books, &self.plan, &self.answers).await?;
        books.close().await?;
        Ok(verdict)
    }

    /// Gives each user what their orders cost, before payment starts.
    async fn open_accounts(&self) -> Result<(), Error> {
        let file = self.home.database(Role::Payment);
        let database = self.home.engines().database(Role::Payment, &file);
        let database = payment::Database::parse(&database).map_err(Error::Database)?;
        Ok(payment::open_accounts(&database, self.plan.opening_balances()).await?)
    }

    /// Ends when no order was settled for longer than anybody's patience.
    async fn standstill(&self) {
        let mut stage = self.stage.subscribe();
        while tokio::time::timeout(PATIENCE, stage.changed())
            .await
            .is_ok()
        {}
    }

    /// Waits until everything is delivered and everybody has died who was to.
    async fn settle(&self, crew: &mut Crew) -> Result<(), Error> {
        let since = Instant::now();
        let mut books = None;
        let mut least = i64::MAX;
        let mut moved = since;
        loop {
            // A process that is just coming back may have its file locked.
            let unfinished = match within(READ_WITHIN, self.unfinished(&mut books)).await {
                Ok(number) => Some(number),
                Err(_) => {
                    books = None;
                    None
                }
            };
            if unfinished == Some(0) && crew.is_past_all_deaths() {
                break;
            }
            if unfinished.is_some_and(|number| number < least) {
                least = unfinished.unwrap_or(least);
                moved = Instant::now();
            }
            if moved.elapsed() > PATIENCE {
                break;
            }
            if unfinished == Some(0) && since.elapsed() > LAST_CALL_AFTER {
                self.stage.send_if_modified(|stage| {
                    let is_first = !stage.last_call;
                    stage.last_call = true;
                    is_first
                });
            }
            tokio::select! {
                error = crew.failed() => return Err(error),
                () = sleep(LOOK) => {}
            }
        }
        if let Some(books) = books {
            books.close().await.map_err(Error::Audit)?;
        }
        Ok(())
    }

    async fn unfinished(&self, books: &mut Option<Books>) -> Result<i64, sqlx::Error> {
        if self.home.engines().is_production() {
            // A copy is of the moment in which it was made.
            *books = None;
        }
        let books = match books {
            Some(books) => books,
            None => books.insert(Books::open(&self.home).await?),
        };
        books.unfinished().await
    }
}

/// Cuts all connections to RabbitMQ when a third of the orders is settled, and when two are.
async fn cut_on_the_way(
    home: Arc<Home>,
    tally: Arc<Tally>,
    mut stage: watch::Receiver<Stage>,
    orders: u64,
) {
    for at in [orders / 3, orders * 2 / 3] {
        if stage.wait_for(|stage| stage.settled >= at).await.is_err() {
            return;
        }
        if home.engines().cut() {
            tally.cut();
        }
    }
}

/// The databases' answer, if it comes in time.
async fn within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let answered = tokio::time::timeout(limit, answer).await;
    answered.unwrap_or_else(|_| Err(engines::no_answer()))
}

/// Says what is going to be tried, beside the result if that is for a program.
fn tell(opening: &str, json: bool) -> Result<(), Error> {
    if json {
        // If nobody can read it, the run goes on all the same.
        let _ = std::io::stderr().write_all(opening.as_bytes());
        return Ok(());
    }
    print(opening)
}

/// Writes to standard output. A reader that has read enough is no failure.
fn print(text: &str) -> Result<(), Error> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Write(error)),
        _ => Ok(()),
    }
}
