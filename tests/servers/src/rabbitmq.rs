//! A throwaway RabbitMQ: one node that knows of no other, with an epmd of its own.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::folder::{Folder, send};
use crate::port::Port;
use crate::{Error, Options, programs, run, wait};

/// A node needs 4 s on an idle machine.
const STARTED_WITHIN: Duration = Duration::from_secs(90);
const STOPPED_WITHIN: Duration = Duration::from_secs(60);
const STOPPED_FOR_NOW_WITHIN: Duration = Duration::from_secs(5);
/// An Erlang of its own is started for each command.
const COMMAND_WITHIN: Duration = Duration::from_secs(60);
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Whoever connects says which protocol it means: AMQP 0-9-1.
const PROTOCOL_HEADER: &[u8; 8] = b"AMQP\x00\x00\x09\x01";
/// The server's first frame, `connection.start`, is of this type.
const METHOD_FRAME: u8 = 1;
/// For every Erlang that is started here, also the short ones: talk to others on loopback only.
const LOOPBACK: &str = "-kernel inet_dist_use_interface {127,0,0,1}";
/// What it is told unless a test says otherwise.
const SETTINGS: [(&str, &str); 4] = [
    ("loopback_users.guest", "true"),
    ("log.console", "false"),
    ("disk_free_limit.absolute", "50MB"),
    // Held in memory until it is full; 512 MB by default.
    ("raft.wal_max_size_bytes", "64000000"),
];

/// A RabbitMQ with the user `guest`.
#[derive(Debug)]
pub struct RabbitMq {
    scripts: PathBuf,
    amqp: Port,
    distribution: Port,
    names: Port,
    epmd: Option<Child>,
    node: Option<Child>,
    folder: Folder,
}

impl RabbitMq {
    /// Starts one with the defaults.
    ///
    /// # Errors
    /// If it is not installed or does not speak AMQP in time; the error has the end of its log.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(&Options::new())
    }

    /// Starts one that lives elsewhere or is told more.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(options: &Options) -> Result<Self, Error> {
        let mut rabbitmq = Self {
            scripts: programs::rabbitmq()?,
            folder: Folder::of_server("rabbitmq", options)?,
            amqp: Port::take()?,
            distribution: Port::take()?,
            names: Port::take()?,
            epmd: None,
            node: None,
        };
        rabbitmq.configure(options)?;
        rabbitmq.start_again()?;
        Ok(rabbitmq)
    }

    /// Its URL, with the virtual host `/`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port())
    }

    /// Its port for AMQP, the same after every start.
    pub fn port(&self) -> u16 {
        self.amqp.number
    }

    /// Its folder, with `log`, `mnesia` and `home` in it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process id of the Erlang machine.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self) -> Result<u32, Error> {
        if self.node.is_none() {
            return Err(Error::new("RabbitMQ does not run"));
        }
        let file = self.pid_file();
        fs::read_to_string(&file)
            .map_err(Error::cannot(format!("read {}", file.display())))?
            .trim()
            .parse()
            .map_err(|error| Error::new(format!("{} holds no pid: {error}", file.display())))
    }

    /// Runs `rabbitmqctl` with these words and returns what it printed, without headers.
    ///
    /// # Errors
    /// If it fails or takes longer than 60 s.
    pub fn ctl(&self, words: &[&str]) -> Result<String, Error> {
        let mut rabbitmqctl = self.program(self.scripts.join("rabbitmqctl"));
        rabbitmqctl
            .args(["--silent", "--node", &self.node_name()])
            .args(words);
        Ok(run::to_its_end(&mut rabbitmqctl, COMMAND_WITHIN)?
            .trim_end()
            .to_owned())
    }

    /// Evaluates an Erlang expression in the node.
    ///
    /// # Errors
    /// As [`ctl`](Self::ctl).
    pub fn eval(&self, expression: &str) -> Result<String, Error> {
        self.ctl(&["eval", expression])
    }

    /// Stops the node's process where it is: connections stay open, nothing answers.
    ///
    /// # Errors
    /// If it does not run.
    pub fn freeze(&self) -> Result<(), Error> {
        let pid = self.pid()?;
        send(Signal::SIGSTOP, pid)?;
        wait::until("RabbitMQ standing still", STOPPED_FOR_NOW_WITHIN, || {
            let status = format!("/proc/{pid}/status");
            let text = fs::read_to_string(&status).map_err(Error::cannot("read its state"))?;
            Ok(text.contains("\nState:\tT").then_some(()))
        })
    }

    /// Lets it go on after [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// If it does not run.
    pub fn thaw(&self) -> Result<(), Error> {
        send(Signal::SIGCONT, self.pid()?)
    }

    /// Stops it in good order.
    ///
    /// # Errors
    /// If it does not stop in time.
    pub fn stop(&mut self) -> Result<(), Error> {
        if self.node.is_none() {
            return Ok(());
        }
        send(Signal::SIGTERM, self.pid()?)?;
        wait::until(
            "RabbitMQ's end after SIGTERM",
            STOPPED_WITHIN,
            || match &mut self.node {
                Some(node) => node.try_wait().map_err(Error::cannot("wait for RabbitMQ")),
                None => Ok(None),
            },
        )?;
        // Its epmd, and whatever else it had started.
        self.kill()
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

    /// Starts it after [`stop`](Self::stop) or [`kill`](Self::kill): same folder, same ports,
    /// same name.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<(), Error> {
        if self.node.is_some() {
            return Err(Error::new("RabbitMQ was not stopped"));
        }
        let started = self
            .forget_pid()
            .and_then(|()| self.start_epmd())
            .and_then(|()| self.start_node());
        started.map_err(|error| {
            let log = |name| fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
            let (node, output) = (run::tail(&log("log")), run::tail(&log("output")));
            // What is left of this start would be in the way of the next.
            let _ = self.kill();
            Error::new(format!(
                "RabbitMQ did not start: {error}; its log says\n{node}\n\
                 and its start script said\n{output}"
            ))
        })
    }

    fn configure(&self, options: &Options) -> Result<(), Error> {
        let mut text = format!("listeners.tcp.1 = 127.0.0.1:{}\n", self.port());
        let own = options.settings.iter();
        let own = own.map(|(key, value)| (key.as_str(), value.as_str()));
        // The last line wins.
        for (key, value) in SETTINGS.into_iter().chain(own) {
            // A string takes text without fail.
            let _ = writeln!(text, "{key} = {value}");
        }
        let folder = self.folder.path();
        fs::write(folder.join("rabbitmq.conf"), text)
            .and_then(|()| fs::create_dir(folder.join("home")))
            .map_err(Error::cannot(format!("write to {}", folder.display())))
    }

    /// The pid of an earlier start would be taken for this one's.
    fn forget_pid(&self) -> Result<(), Error> {
        let file = self.pid_file();
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::cannot(format!("remove {}", file.display()))(error))
            }
            _ => Ok(()),
        }
    }

    /// RabbitMQ would start one itself, but as a daemon that outlives it and works elsewhere.
    fn start_epmd(&mut self) -> Result<(), Error> {
        let port = self.names.number;
        let epmd = self
            .program("epmd")
            .args(["-address", "127.0.0.1", "-port", &port.to_string()])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::cannot("run epmd"))?;
        self.epmd = Some(epmd);
        wait::until("epmd listening", STARTED_WITHIN, || {
            run::still_runs(self.epmd.as_mut())?;
            Ok(connect(port).ok())
        })?;
        Ok(())
    }

    fn start_node(&mut self) -> Result<(), Error> {
        let output = self.folder.path().join("output");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&output)
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(Error::cannot(format!("write {}", output.display())))?;
        let node = self
            .program(self.scripts.join("rabbitmq-server"))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.0)
            .stderr(file.1)
            .spawn()
            .map_err(Error::cannot("run rabbitmq-server"))?;
        self.node = Some(node);
        let port = self.port();
        // It listens as its last step of starting.
        wait::until("speaking AMQP", STARTED_WITHIN, || {
            run::still_runs(self.node.as_mut())?;
            Ok(speaks_amqp(port).then_some(()))
        })
    }

    /// One of its programs, in its folder, with nothing of our environment and nothing of the
    /// machine's configuration.
    fn program(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let within = |name: &str| self.folder.path().join(name).into_os_string();
        let text = |text: &str| OsString::from(text);
        let port = |port: &Port| OsString::from(port.number.to_string());
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).env_clear().envs([
            ("PATH", programs::search_path()),
            ("LANG", text("C.UTF-8")),
            // Erlang's cookie is there.
            ("HOME", within("home")),
            ("ERL_AFLAGS", text(LOOPBACK)),
            ("ERL_EPMD_ADDRESS", text("127.0.0.1")),
            ("ERL_EPMD_PORT", port(&self.names)),
            ("RABBITMQ_NODENAME", text(&self.node_name())),
            ("RABBITMQ_DIST_PORT", port(&self.distribution)),
            // Any free port, so that many commands can run at once.
            ("RABBITMQ_CTL_DIST_PORT_MIN", text("0")),
            ("RABBITMQ_CTL_DIST_PORT_MAX", text("0")),
            ("RABBITMQ_CONF_ENV_FILE", text("/dev/null")),
            ("RABBITMQ_CONFIG_FILE", within("rabbitmq.conf")),
            ("RABBITMQ_CONFIG_FILES", within("conf.d/*.conf")),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", within("advanced.config")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", within("plugins")),
            ("RABBITMQ_GENERATED_CONFIG_DIR", within("config")),
            ("RABBITMQ_SCHEMA_DIR", within("schema")),
            ("RABBITMQ_MNESIA_BASE", within("mnesia")),
            ("RABBITMQ_LOG_BASE", within("logs")),
            ("RABBITMQ_LOGS", within("log")),
            ("RABBITMQ_PID_FILE", within("pid")),
        ]);
        command
    }

    fn node_name(&self) -> String {
        format!("handfast{}@localhost", self.port())
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.path().join("pid")
    }

    /// Takes note of the ends of our children, so that no zombie is left.
    fn collect(&mut self) {
        for mut child in self.node.take().into_iter().chain(self.epmd.take()) {
            // It was killed, so this returns.
            let _ = child.wait();
        }
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        self.folder.remove();
        self.collect();
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&address, ANSWER_WITHIN)
}

fn speaks_amqp(port: u16) -> bool {
    let spoken = || -> io::Result<u8> {
        let mut connection = connect(port)?;
        connection.set_read_timeout(Some(ANSWER_WITHIN))?;
        connection.write_all(PROTOCOL_HEADER)?;
        let mut kind = [0];
        connection.read_exact(&mut kind)?;
        Ok(kind[0])
    };
    spoken().is_ok_and(|kind| kind == METHOD_FRAME)
}
