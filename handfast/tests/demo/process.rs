//! The demo as a process that does not run for ever, and what can be seen of its children.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A condition that has not come true by then never will.
const SOON: Duration = Duration::from_secs(60);
/// The longest run here is one that waits in vain, several times.
const ENDS_WITHIN: Duration = Duration::from_secs(150);

pub(crate) fn demo(arguments: &[&str], temporary: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handfast"));
    command
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs to the end.
pub(crate) fn output(mut command: Command) -> Output {
    end(command.spawn().unwrap())
}

/// How it ended and what it said. What does not end is killed, and the test fails.
pub(crate) fn end(child: Child) -> Output {
    let pid = pid(&child);
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(child.wait_with_output()));
    let Ok(output) = told.recv_timeout(ENDS_WITHIN) else {
        kill(pid, Signal::SIGKILL).unwrap();
        panic!("the demo has not ended within {ENDS_WITHIN:?}");
    };
    output.unwrap()
}

pub(crate) fn send(child: &Child, signal: Signal) {
    kill(pid(child), signal).unwrap();
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The result of a run with `--json`.
pub(crate) fn result(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

pub(crate) fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

/// The command lines, as everybody can read them, of all processes that a demo with this temporary
/// folder has started.
pub(crate) fn command_lines(temporary: &Path) -> Vec<String> {
    let variable = format!("TMPDIR={}", temporary.display());
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let process = entry.ok()?.path();
            let read = |file| {
                let bytes = std::fs::read(process.join(file)).ok()?;
                Some(String::from_utf8_lossy(&bytes).replace('\0', " "))
            };
            let is_ours = read("environ")?.contains(&variable);
            read("cmdline").filter(|line| is_ours && line.contains(" demo-party "))
        })
        .collect()
}

/// Looks until it is so, or fails.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let ends = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < ends, "waited {SOON:?} until {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}
