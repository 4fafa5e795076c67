//! One process of the demo: started from this binary, killed or stopped, always reaped.
//!
//! A child gets the reading end of a pipe as its standard input and ends when that closes (see
//! [`watch_parent`]): so it cannot outlive us, whatever we die of. It has a process group of
//! its own, so that Ctrl-C in a terminal reaches us alone.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

use super::Error;
use super::home::Home;
use super::plan::{Death, Role};

/// The hidden subcommand that runs one process of the demo.
pub(crate) const SUBCOMMAND: &str = "demo-party";

/// A payment is left to a call for this long before it is answered PROCESSING.
pub(crate) const PAY_DEADLINE_MS: u64 = 3_000;
/// How often payment's job looks for what a crash has left.
const JOB_INTERVAL_MS: u64 = 250;
/// Of all confirms, so many are lost on their way.
const LOST_CONFIRMS: &str = "producer.transact.lose-confirm=3%return";
/// A child that was asked to stop and has not stopped by then is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(8);
/// Variables with these beginnings would overrule what the demo tells its children.
const OVERRULING: [&str; 4] = ["HANDFAST_", "PAYMENT_", "ACCOUNTING_", "POINTS_"];
/// Of a log, at most this many last bytes are looked at.
const LOG_TAIL_BYTES: usize = 4_096;

/// How a life ended that was planned to end in a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Died {
    /// By SIGKILL.
    Killed,
    /// By abort, at its fail point.
    Aborted,
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Party {
    role: Role,
    child: Child,
    /// It is to abort where it passes a fail point.
    is_armed: bool,
    /// Kept apart from the child, because waiting for a child closes what it has.
    _lifeline: Option<ChildStdin>,
}

impl Party {
    /// Starts a process, with the fail point of its planned death.
    pub(crate) fn start(role: Role, home: &Home, death: Option<Death>) -> Result<Self, Error> {
        Self::spawn(role, home, death).map_err(|source| Error::Start { role, source })
    }

    fn spawn(role: Role, home: &Home, death: Option<Death>) -> std::io::Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(home.log(role))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(SUBCOMMAND)
            .args(arguments(role, home))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true);
        for (name, _) in std::env::vars_os() {
            let shown = name.to_string_lossy();
            if OVERRULING.iter().any(|begin| shown.starts_with(begin)) {
                command.env_remove(&name);
            }
        }
        command
            .envs(environment(role, home))
            .env(handfast_fail_points::ENVIRONMENT, fail_points(role, death));
        let mut child = command.spawn()?;
        let lifeline = child.stdin.take();
        Ok(Self {
            role,
            child,
            is_armed: matches!(death, Some(Death::Abort { .. })),
            _lifeline: lifeline,
        })
    }

    /// Waits until the process ends by itself, which is right only at its fail point.
    pub(crate) async fn aborted(&mut self, home: &Home) -> Result<Died, Error> {
        let status = self.wait().await?;
        self.death(status, home)
    }

    /// Ends the process by SIGKILL. It may be faster and abort.
    pub(crate) async fn kill(&mut self, home: &Home) -> Result<Died, Error> {
        // It fails only if the process is gone, and then its status tells the truth.
        let _ = self.child.start_kill();
        let status = self.wait().await?;
        self.death(status, home)
    }

    /// Asks the process to stop, and waits until it has. On its way it may pass its fail point.
    pub(crate) async fn stop(&mut self, home: &Home) -> Result<(), Error> {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // As above.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        match timeout(STOP_DEADLINE, self.child.wait()).await {
            Ok(Ok(status)) if status.success() || self.has_aborted(status) => Ok(()),
            Ok(Ok(status)) => Err(self.ended(status, home)),
            Ok(Err(source)) => Err(Error::Wait {
                role: self.role,
                source,
            }),
            Err(_) => {
                let _ = self.child.kill().await;
                Err(Error::NotStopped {
                    role: self.role,
                    waited_s: STOP_DEADLINE.as_secs(),
                })
            }
        }
    }

    fn has_aborted(&self, status: ExitStatus) -> bool {
        self.is_armed && status.signal() == Some(Signal::SIGABRT as i32)
    }

    /// Ends the process without any question.
    pub(crate) async fn end(mut self) {
        // What cannot be killed is gone already.
        let _ = self.child.kill().await;
    }

    async fn wait(&mut self) -> Result<ExitStatus, Error> {
        self.child.wait().await.map_err(|source| Error::Wait {
            role: self.role,
            source,
        })
    }

    fn death(&self, status: ExitStatus, home: &Home) -> Result<Died, Error> {
        match status.signal() {
            Some(signal) if signal == Signal::SIGKILL as i32 => Ok(Died::Killed),
            Some(signal) if signal == Signal::SIGABRT as i32 => Ok(Died::Aborted),
            _ => Err(self.ended(status, home)),
        }
    }

    /// An end that was not planned.
    pub(crate) fn ended(&self, status: ExitStatus, home: &Home) -> Error {
        let role = self.role;
        Error::Ended {
            role,
            status,
            said: last_line(&std::fs::read(home.log(role)).unwrap_or_default()),
        }
    }
}

/// What the hidden subcommand is told where everybody can read it.
fn arguments(role: Role, home: &Home) -> Vec<OsString> {
    let deployment = home.engines().deployment().to_owned();
    let handler_ms = home.engines().timers().handler_ms.to_string();
    let list = |items: &[&dyn AsRef<std::ffi::OsStr>]| {
        items
            .iter()
            .map(|item| (*item).as_ref().to_owned())
            .collect()
    };
    match role {
        Role::Service => list(&[&"service", &"--config", &home.config()]),
        Role::Payment => list(&[
            &"payment",
            &"--listen",
            &home.payment().to_string(),
            &"--status-listen",
            &home.status().to_string(),
            &"--service",
            &home.service_url(),
            &"--job-interval-ms",
            &JOB_INTERVAL_MS.to_string(),
            &"--pay-deadline-ms",
            &PAY_DEADLINE_MS.to_string(),
        ]),
        Role::Accounting | Role::Points => list(&[
            &role.name(),
            &"--deployment",
            &deployment,
            &"--handler-timeout-ms",
            &handler_ms,
        ]),
    }
}

/// What it is told in its environment, because a URL may carry a password: every user of a machine
/// can read the command lines of all processes.
fn environment(role: Role, home: &Home) -> Vec<(String, String)> {
    let engines = home.engines();
    let database = engines.database(role, &home.database(role));
    let source = engines.source(&home.service_url());
    let variable = |key: &str| format!("{}_{key}", role.name().to_uppercase());
    match role {
        // It reads its configuration file.
        Role::Service => Vec::new(),
        Role::Payment => vec![(variable("DATABASE"), database)],
        Role::Accounting | Role::Points => vec![
            (variable("DATABASE"), database),
            (variable("SOURCE"), source),
        ],
    }
}

fn fail_points(role: Role, death: Option<Death>) -> String {
    let mut armed = Vec::new();
    if role == Role::Payment {
        armed.push(LOST_CONFIRMS.to_owned());
    }
    if let Some(Death::Abort { point, nth }) = death {
        armed.push(format!("{point}=abort@{nth}"));
    }
    armed.join(";")
}

/// The last line of a log that says something.
fn last_line(log: &[u8]) -> String {
    let tail = &log[log.len().saturating_sub(LOG_TAIL_BYTES)..];
    let tail = String::from_utf8_lossy(tail);
    let last = tail.lines().rev().find(|line| !line.trim().is_empty());
    last.unwrap_or("nothing").trim().to_owned()
}

/// Called by a child, first of all: ends this process when its parent is gone, and keeps its
/// deaths from filling the disk with core dumps.
pub(crate) fn watch_parent() -> std::io::Result<()> {
    // A system that does not let us lower a limit dumps; the demo works all the same.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    std::thread::Builder::new()
        .name("parent".to_owned())
        .spawn(|| {
            let mut nothing = [0];
            // The parent never writes, so any return means that its end of the pipe is closed.
            let _ = std::io::stdin().read(&mut nothing);
            std::process::exit(1);
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use handfast_fail_points::Point;

    use super::*;

    #[test]
    fn what_a_child_is_armed_with_can_be_armed() {
        let death = Death::Abort {
            point: Point::PRODUCER_AFTER_CONFIRM,
            nth: 3,
        };
        let armed = fail_points(Role::Payment, Some(death));
        for entry in armed.split(';') {
            handfast_fail_points::arm(entry).unwrap();
        }
        assert_eq!(fail_points(Role::Service, Some(Death::Kill)), "");
    }

    #[test]
    fn the_last_line_of_a_log_is_found() {
        assert_eq!(last_line(b"one\n  two \n\n"), "two");
        assert_eq!(last_line(b""), "nothing");
    }
}
