//! The binary as a process, in a folder of its own and without the caller's environment.

use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

/// A condition that has not come true by then never will.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The binary with these arguments, in this folder.
pub(crate) fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handfast"));
    command
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Runs to the end.
pub(crate) async fn output(mut command: Command) -> Output {
    timeout(SOON, command.output()).await.unwrap().unwrap()
}

/// Runs what has to fail, and returns its exit code and its one line without `error: `.
pub(crate) async fn refused(folder: &Path, arguments: &[&str]) -> (i32, String) {
    line_of(&output(command(folder, arguments)).await)
}

/// The exit code and the one line of what failed.
pub(crate) fn line_of(output: &Output) -> (i32, String) {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.stdout, b"", "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let line = said.trim_end().strip_prefix("error: ").unwrap();
    (output.status.code().unwrap(), line.to_owned())
}

/// What it printed on standard output, if it worked.
pub(crate) async fn printed(folder: &Path, arguments: &[&str]) -> String {
    let output = output(command(folder, arguments)).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A folder with this text as `handfast.toml`.
pub(crate) fn folder(config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("handfast.toml"), config).unwrap();
    folder
}

/// A service that serves.
pub(crate) struct Serving {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    pub(crate) address: String,
    /// What it logged until it served.
    pub(crate) before: Vec<String>,
}

impl Serving {
    /// Starts `serve` on a free port, unless the command says otherwise, and waits until it
    /// serves.
    pub(crate) async fn start(folder: &Path) -> Self {
        Self::spawn(command(folder, &["serve", "--listen", "127.0.0.1:0"])).await
    }

    pub(crate) async fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut before = Vec::new();
        let address = loop {
            let line = timeout(SOON, log.next_line()).await.unwrap().unwrap();
            let line = line.unwrap_or_else(|| panic!("it ended: {before:?}"));
            if let Some((_, rest)) = line.split_once("serving on ") {
                let end = |c: char| !(c.is_ascii_digit() || ".:".contains(c));
                break rest.split(end).next().unwrap_or(rest).to_owned();
            }
            before.push(line);
        };
        Self {
            child,
            log,
            address,
            before,
        }
    }

    /// One connection.
    pub(crate) async fn connect(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect().await.unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
    }

    /// Waits for a line of the log.
    pub(crate) async fn logs(&mut self, text: &str) {
        loop {
            let line = timeout(SOON, self.log.next_line()).await.unwrap().unwrap();
            if line.unwrap_or_else(|| panic!("it ended")).contains(text) {
                return;
            }
        }
    }

    /// Waits for the end, and returns how it ended and what it logged meanwhile.
    pub(crate) async fn end(mut self) -> (ExitStatus, Vec<String>) {
        let mut said = Vec::new();
        while let Some(line) = timeout(SOON, self.log.next_line()).await.unwrap().unwrap() {
            said.push(line);
        }
        let status = timeout(SOON, self.child.wait()).await.unwrap().unwrap();
        (status, said)
    }

    /// Nobody reads its log any more; returns how it ended once it has.
    pub(crate) async fn end_unheard(mut self, signal: Signal) -> ExitStatus {
        drop(self.log);
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
        timeout(SOON, self.child.wait()).await.unwrap().unwrap()
    }
}
