//! `handfast demo` from the outside: what it says, how it ends, and what it leaves behind.

#![cfg(feature = "demo")]
#![expect(clippy::unwrap_used, reason = "a test fails loudly")]

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DEADLINE: Duration = Duration::from_secs(60);

fn demo(arguments: &[&str], temporary: &Path) -> Command {
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

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

/// Processes whose command line names the folder: everything that the demo has started there.
fn processes_in(folder: &Path) -> usize {
    let folder = folder.to_string_lossy().into_owned();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| {
            let line = String::from_utf8_lossy(line).into_owned();
            line.contains("demo-party") && line.contains(&folder)
        })
        .count()
}

/// Looks until it is so, or fails.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let ends = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < ends, "waited {DEADLINE:?} until {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

#[test]
fn a_wrong_call_is_one_line_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in [
        &["--payments", "0"] as &[_],
        &["--payments", "1000001"],
        &["--payments", "many"],
        &["--store", "mysql://user:secret@host/db"],
        &["--broker", "sqlite"],
    ] {
        let output = demo(wrong, dir.path()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{wrong:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn engines_that_do_not_go_together_are_refused_without_their_passwords() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in [
        &["--store", "postgres://user:secret@host/db"] as &[_],
        &["--broker", "amqp://user:secret@host"],
        &[
            "--store",
            "postgres://user:secret@host/db",
            "--broker",
            "amqps://user:secret@host",
        ],
    ] {
        let output = demo(wrong, dir.path()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
}

#[test]
fn servers_that_are_not_there_are_said_to_be_so_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = [
        "--store",
        "postgres://user:secret@127.0.0.1:1/db",
        "--broker",
        "amqp://user:secret@127.0.0.1:1",
    ];
    let output = demo(&arguments, dir.path()).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("the server of --store runs"), "{said}");
    assert!(!said.contains("secret"), "{said}");
}

/// A server that tests use. Without one they fail: there is nothing else they could say.
fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set; run `cargo xtask test`, or name a server")
    })
}

#[test]
fn a_small_run_on_servers_adds_up_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (store, broker) = (
        server("HANDFAST_TEST_POSTGRES"),
        server("HANDFAST_TEST_AMQP"),
    );
    let arguments = [
        "--payments",
        "60",
        "--seed",
        "4",
        "--json",
        "--store",
        &store,
        "--broker",
        &broker,
    ];
    let output = demo(&arguments, dir.path()).output().unwrap();
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let result: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    for zero in ["lost", "phantom", "doubled", "unbalanced", "unfinished"] {
        assert_eq!(result[zero].as_i64(), Some(0), "{zero} in {result}");
    }
    assert_eq!(result["committed"].as_i64(), Some(57), "{result}");
    assert_eq!(result["accounting_effects"].as_i64(), Some(57), "{result}");
    assert_eq!(result["points_effects"].as_i64(), Some(57), "{result}");
    assert_eq!(result["connection_cuts"].as_i64(), Some(2), "{result}");
    let begin = said.find("handfast_demo_").expect("the names are told");
    let deployment = &said[begin..begin + "handfast_demo_".len() + 8];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (databases, queue) = runtime.block_on(left_behind(&store, &broker, deployment));
    assert_eq!(databases, 0, "databases {deployment}_… are left");
    assert!(!queue, "queues {deployment}.… are left");
}

/// How many databases of a deployment are left, and whether its queue of answers is.
async fn left_behind(store: &str, broker: &str, deployment: &str) -> (i64, bool) {
    use sqlx::Connection as _;

    let mut db = sqlx::PgConnection::connect(store).await.unwrap();
    let databases =
        sqlx::query_scalar("SELECT count(*) FROM pg_database WHERE datname LIKE $1 || '\\_%'")
            .bind(deployment)
            .fetch_one(&mut db)
            .await
            .unwrap();
    let options = lapin::ConnectionProperties::default();
    let rabbitmq = lapin::Connection::connect(broker, options).await.unwrap();
    let channel = rabbitmq.create_channel().await.unwrap();
    let passive = lapin::options::QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let queue = format!("{deployment}.acknowledge");
    let looked = channel.queue_declare(queue.into(), passive, Default::default());
    (databases, looked.await.is_ok())
}

#[test]
fn a_small_run_adds_up_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--payments", "60", "--seed", "4", "--json"];
    let output = demo(&arguments, dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let result: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let number = |name: &str| {
        let value = result[name].as_i64();
        value.unwrap_or_else(|| panic!("{name} is not an integer in {result}"))
    };
    for zero in ["lost", "phantom", "doubled", "unbalanced", "unfinished"] {
        assert_eq!(number(zero), 0, "{result}");
    }
    let confirmed = number("confirmed_by_producer") + number("confirmed_by_check");
    let cancelled = number("cancelled_by_producer") + number("cancelled_by_check");
    let effects = number("accounting_effects") + number("points_effects");
    assert_eq!(number("committed"), 57, "{result}");
    assert_eq!(number("committed"), confirmed);
    assert_eq!(number("prepared"), confirmed + cancelled);
    assert_eq!(
        number("attempted"),
        number("committed") + number("rolled_back")
    );
    assert_eq!(effects, 2 * confirmed);
    assert_eq!(
        number("deliveries"),
        effects + number("duplicates_absorbed")
    );
    for party in ["service_kills", "producer_kills", "consumer_kills"] {
        assert!(number(party) >= 2, "{party} in {result}");
    }
    assert!(result["elapsed_s"].as_f64().is_some_and(|s| s > 0.0));
    assert!(is_empty(dir.path()), "files are left");
}

#[test]
fn what_is_to_be_kept_is_kept_and_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let keep = dir.path().join("kept");
    let arguments = ["--payments", "1", "--keep", keep.to_str().unwrap()];
    let output = demo(&arguments, dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("It adds up"));
    for party in ["service", "payment", "accounting", "points"] {
        assert!(keep.join(format!("{party}.db")).exists(), "{party}");
    }
    let again = demo(&arguments, dir.path()).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(stderr(&again).lines().count(), 1, "{}", stderr(&again));
    assert!(stderr(&again).contains("former run"));
}

#[test]
fn ctrl_c_ends_the_children_and_removes_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = demo(&["--payments", "100000"], dir.path()).spawn().unwrap();
    until("all children run", || processes_in(dir.path()) >= 4);
    send(&running, Signal::SIGINT);
    let status = running.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert_eq!(processes_in(dir.path()), 0, "children are left");
    assert!(is_empty(dir.path()), "files are left");
    let mut said = String::new();
    running
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(said.contains("ended by a signal"), "{said}");
}

#[test]
fn children_do_not_outlive_a_parent_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = demo(&["--payments", "100000"], dir.path()).spawn().unwrap();
    until("all children run", || processes_in(dir.path()) >= 4);
    send(&running, Signal::SIGKILL);
    running.wait().unwrap();
    until("all children are gone", || processes_in(dir.path()) == 0);
}
