//! A child process that can be killed, frozen and asked how it died, and that never outlives
//! the test.

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::wait::eventually;

/// How much of a log a failed test prints.
const TAIL_LINES: usize = 25;

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command; both of its outputs are appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let output = || {
            let file = OpenOptions::new().create(true).append(true).open(log);
            Stdio::from(file.expect("the log of a child can be written"))
        };
        let child = command
            // The reference services end when this pipe closes: they do not outlive a test
            // program that was killed itself.
            .stdin(Stdio::piped())
            .stdout(output())
            .stderr(output())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        }
    }

    /// Sends a signal to this process and to no other.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is small"));
        signal::kill(pid, signal)
            .unwrap_or_else(|error| panic!("cannot send {signal} to {}: {error}", self.name));
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Waits for its end.
    pub async fn end(&mut self, deadline: Duration) -> ExitStatus {
        let name = self.name.clone();
        eventually(format!("the end of {name}"), deadline, async || {
            self.ended().ok_or_else(|| "it runs".to_owned())
        })
        .await
    }

    /// Kills it as a power failure would, and waits until it is gone.
    pub async fn kill(mut self) {
        assert_eq!(
            self.ended(),
            None,
            "{} has ended before it was killed",
            self.name
        );
        self.signal(Signal::SIGKILL);
        let status = self.end(Duration::from_secs(5)).await;
        assert_eq!(
            status.signal(),
            Some(Signal::SIGKILL as i32),
            "{}",
            self.name
        );
    }

    /// Asks it to stop; it must do so in good order.
    pub async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.end(Duration::from_secs(20)).await;
        assert_eq!(status.code(), Some(0), "{} ended with {status}", self.name);
    }

    /// Waits until it has died of this signal; another end fails the test.
    pub async fn died_of(mut self, signal: Signal, deadline: Duration) {
        let status = self.end(deadline).await;
        assert_eq!(
            status.signal(),
            Some(signal as i32),
            "{} ended with {status}",
            self.name
        );
    }

    /// What it logged last.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// The id of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of the log of {}\n{}", self.name, self.tail());
        }
        // It may have ended already; then there is nothing to kill, only to collect.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
