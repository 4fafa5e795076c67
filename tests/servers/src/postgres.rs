//! A throwaway PostgreSQL.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{Uid, User};

use crate::folder::{Folder, send};
use crate::port::Port;
use crate::{Error, Options, programs, run, wait};

/// `initdb` refuses to run as root, so for root one of these does.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];
/// Recovery after a kill is part of it.
const STARTED_WITHIN: Duration = Duration::from_secs(60);
const STOPPED_WITHIN: Duration = Duration::from_secs(30);
const STATEMENT_WITHIN: Duration = Duration::from_secs(30);
/// What it is told unless a test says otherwise. Nothing here makes a commit less durable. No
/// Unix socket, because its path may be too long; no shared memory outside of the folder but for
/// one small segment that the guard knows.
const SETTINGS: [(&str, &str); 7] = [
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_directories", ""),
    ("dynamic_shared_memory_type", "mmap"),
    ("max_connections", "400"),
    ("shared_buffers", "64MB"),
    ("max_wal_size", "256MB"),
    ("log_line_prefix", "%m [%p] %d "),
];

/// A PostgreSQL with a superuser `postgres` that needs no password.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    user: Option<User>,
    port: Port,
    postmaster: Option<Child>,
    folder: Folder,
}

impl Postgres {
    /// Starts one with the defaults.
    ///
    /// # Errors
    /// If it is not installed or does not accept connections in time; the error has the end of
    /// its log.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(&Options::new())
    }

    /// Starts one that lives elsewhere or is told more.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(options: &Options) -> Result<Self, Error> {
        let programs = programs::postgres()?;
        let user = if Uid::effective().is_root() {
            Some(unprivileged()?)
        } else {
            None
        };
        let folder = Folder::of_server("postgres", options)?;
        if let Some(user) = &user {
            folder.give_to(user.uid, user.gid)?;
        }
        let mut postgres = Self {
            programs,
            user,
            port: Port::take()?,
            postmaster: None,
            folder,
        };
        postgres.init(options)?;
        postgres.start_again()?;
        Ok(postgres)
    }

    /// The URL of a database. Only `postgres` and the templates exist in the beginning.
    pub fn url(&self, database: &str) -> String {
        let port = self.port();
        format!("postgres://postgres@127.0.0.1:{port}/{database}")
    }

    /// The URL of the database `postgres`, from which others are created.
    pub fn admin_url(&self) -> String {
        self.url("postgres")
    }

    /// Its port, the same after every start.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Its folder, with `data` and `log` in it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process id of the postmaster.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self) -> Result<u32, Error> {
        let postmaster = self.postmaster.as_ref().map(Child::id);
        postmaster.ok_or_else(|| Error::new("PostgreSQL does not run"))
    }

    /// Runs one statement with `psql` and returns the rows it prints, unaligned.
    ///
    /// # Errors
    /// If the statement fails or takes longer than 30 s.
    pub fn sql(&self, database: &str, statement: &str) -> Result<String, Error> {
        let mut psql = self.program("psql");
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .args(["-d", &self.url(database), "-c", statement]);
        Ok(run::to_its_end(&mut psql, STATEMENT_WITHIN)?
            .trim_end()
            .to_owned())
    }

    /// Stops it in good order; connections are cut.
    ///
    /// # Errors
    /// If it does not stop in time.
    pub fn stop(&mut self) -> Result<(), Error> {
        let Some(postmaster) = &mut self.postmaster else {
            return Ok(());
        };
        send(Signal::SIGINT, postmaster.id())?;
        wait::until("PostgreSQL's end after SIGINT", STOPPED_WITHIN, || {
            postmaster
                .try_wait()
                .map_err(Error::cannot("wait for PostgreSQL"))
        })?;
        self.postmaster = None;
        Ok(())
    }

    /// Kills all of its processes, as a power failure would.
    ///
    /// # Errors
    /// If one of them does not go.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.folder.kill_everyone()?;
        self.collect();
        Ok(())
    }

    /// Starts it after [`stop`](Self::stop) or [`kill`](Self::kill): same folder, same port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<(), Error> {
        if self.postmaster.is_some() {
            return Err(Error::new("PostgreSQL was not stopped"));
        }
        let log = self.folder.path().join("log");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(Error::cannot(format!("write {}", log.display())))?;
        let postmaster = self
            .program("postgres")
            .arg("-D")
            .arg(self.data())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.0)
            .stderr(file.1)
            .spawn()
            .map_err(Error::cannot("run postgres"))?;
        self.postmaster = Some(postmaster);
        self.wait_until_ready().map_err(|error| {
            let said = run::tail(&fs::read_to_string(&log).unwrap_or_default());
            // What is left of this start would be in the way of the next.
            let _ = self.kill();
            Error::new(format!(
                "PostgreSQL did not start: {error}; its log says\n{said}"
            ))
        })
    }

    fn wait_until_ready(&mut self) -> Result<(), Error> {
        let port = self.port().to_string();
        let mut asked = self.program("pg_isready");
        asked
            .args(["-q", "-h", "127.0.0.1", "-p", &port, "-U", "postgres"])
            .stdin(Stdio::null());
        wait::until("accepting connections", STARTED_WITHIN, || {
            run::still_runs(self.postmaster.as_mut())?;
            let answer = asked.status().map_err(Error::cannot("run pg_isready"))?;
            Ok(answer.success().then_some(()))
        })
    }

    /// Makes the data folder and writes its configuration.
    fn init(&self, options: &Options) -> Result<(), Error> {
        let mut initdb = self.program("initdb");
        initdb
            .arg("-D")
            .arg(self.data())
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8"])
            // The folder itself need not outlive a power failure.
            .args(["--locale=C", "--no-sync"]);
        run::to_its_end(&mut initdb, STARTED_WITHIN).map_err(|error| {
            let folder = self.folder.path().display();
            let who = self
                .user
                .as_ref()
                .map_or(String::new(), |user| format!(" as user {}", user.name));
            Error::new(format!(
                "cannot make a database in {folder}{who}: {error}\n\
                 That user has to be able to enter every folder above it; TMPDIR chooses another."
            ))
        })?;
        let file = self.data().join("postgresql.conf");
        OpenOptions::new()
            .append(true)
            .open(&file)
            .and_then(|mut open| open.write_all(self.settings(options).as_bytes()))
            .map_err(Error::cannot(format!("write {}", file.display())))
    }

    fn settings(&self, options: &Options) -> String {
        let mut text = format!("\nport = {}\n", self.port());
        let own = options.settings.iter();
        let own = own.map(|(key, value)| (key.as_str(), value.as_str()));
        for (key, value) in SETTINGS.into_iter().chain(own) {
            // A string takes text without fail.
            let _ = writeln!(text, "{key} = '{}'", value.replace('\'', "''"));
        }
        text
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// One of its programs, in its folder, as its user, with nothing of our environment.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command
            .current_dir(self.folder.path())
            .env_clear()
            .env("PATH", programs::search_path())
            .env("LC_ALL", "C")
            .env("TZ", "UTC");
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    /// Takes note of the postmaster's end, so that no zombie is left.
    fn collect(&mut self) {
        if let Some(mut postmaster) = self.postmaster.take() {
            // It was killed, so this returns.
            let _ = postmaster.wait();
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.folder.remove();
        self.collect();
    }
}

fn unprivileged() -> Result<User, Error> {
    UNPRIVILEGED
        .into_iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .ok_or_else(|| {
            Error::new(format!(
                "PostgreSQL does not run as root, and there is none of the users {}",
                UNPRIVILEGED.join(", ")
            ))
        })
}
