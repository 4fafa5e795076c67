//! Runs that are cut short: by a signal, by a death, or because a server goes away.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::Signal;
use tokio::runtime::Runtime;

use crate::process::{command_lines, demo, end, is_empty, send, stderr, until};
use crate::servers::{Way, databases, deployment, drop_all, servers};

#[test]
fn ctrl_c_ends_the_children_and_removes_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let running = demo(&["--payments", "100000"], dir.path()).spawn().unwrap();
    until("all children run", || command_lines(dir.path()).len() >= 4);
    send(&running, Signal::SIGINT);
    let output = end(running);
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(command_lines(dir.path()), [""; 0]);
    assert!(is_empty(dir.path()), "files are left");
    let said = stderr(&output);
    assert!(said.contains("ended by a signal"), "{said}");
}

#[test]
fn children_do_not_outlive_a_parent_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let running = demo(&["--payments", "100000"], dir.path()).spawn().unwrap();
    until("all children run", || command_lines(dir.path()).len() >= 4);
    send(&running, Signal::SIGKILL);
    end(running);
    until("all children are gone", || {
        command_lines(dir.path()).is_empty()
    });
}

#[tokio::test]
async fn other_users_can_read_no_password_and_ctrl_c_removes_the_databases() {
    let dir = tempfile::tempdir().unwrap();
    let keep = tempfile::tempdir().unwrap();
    let (store, broker) = servers();
    let arguments = [
        "--payments",
        "100000",
        "--json",
        "--keep",
        keep.path().to_str().unwrap(),
        "--store",
        &store,
        "--broker",
        &broker,
    ];
    let running = demo(&arguments, dir.path()).spawn().unwrap();
    let mut lines = Vec::new();
    until("all children run", || {
        lines = command_lines(dir.path());
        lines.len() >= 4
    });
    send(&running, Signal::SIGINT);
    let output = end(running);
    assert_eq!(output.status.code(), Some(130));
    for line in lines {
        assert!(!line.contains("postgres://"), "{line}");
        assert!(!line.contains("amqp://"), "{line}");
    }
    let config = keep.path().join("handfast.toml");
    assert!(fs::read_to_string(&config).unwrap().contains("amqp://"));
    let mode = fs::metadata(&config).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let said = stderr(&output);
    assert_eq!(databases(&store, deployment(&said)).await, [""; 0]);
}

// The way to the store brings a runtime of its own.
#[test]
fn a_store_that_goes_away_ends_the_run_and_is_reported() {
    let (dir, log) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, broker) = servers();
    let way = Way::to(&store);
    // Nobody dies by this plan before thousands are paid: those who wait for it must still stop.
    let arguments = [
        "--payments",
        "100000",
        "--seed",
        "89",
        "--json",
        "--store",
        &way.url,
        "--broker",
        &broker,
    ];
    let log = log.path().join("stderr");
    let mut command = demo(&arguments, dir.path());
    command.stderr(File::create(&log).unwrap());
    let running = command.spawn().unwrap();
    until("some are paid", || {
        let said = fs::read_to_string(&log).unwrap();
        let mut paid = said.lines().filter(|line| line.contains(" paid, "));
        paid.next_back()
            .is_some_and(|line| !line.contains(" 0 paid, "))
    });
    drop(way);
    let output = end(running);
    let said = fs::read_to_string(&log).unwrap();
    let cleaned = async {
        let left = databases(&store, deployment(&said)).await;
        drop_all(&store, &left).await;
    };
    Runtime::new().unwrap().block_on(cleaned);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().last().unwrap().starts_with("error: "),
        "{said}"
    );
    assert!(said.contains("may be left on the server"), "{said}");
    let mut progress = said.lines().filter(|line| line.ends_with(" killed"));
    assert!(progress.all(|line| line.ends_with(" 0 killed")), "{said}");
    assert_eq!(command_lines(dir.path()), [""; 0]);
    assert!(is_empty(dir.path()), "files are left");
}
