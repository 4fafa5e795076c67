//! What cannot begin is one line, repeats no password, and leaves nothing behind.

use std::fs::OpenOptions;

use crate::process::{demo, output, stderr};
use crate::servers::{Owner, servers};

const NO_STORE: &str = "postgres://user:secret@127.0.0.1:1/db";
const NO_BROKER: &str = "amqp://user:secret@127.0.0.1:1";

#[test]
fn a_wrong_call_is_one_line_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in [
        &["--payments", "0"] as &[_],
        &["--payments", "1000001"],
        &["--payments", "many"],
        &["--payments", "postgres://user:secret@host/db"],
        &["--store", "mysql://user:secret@host/db"],
        &["--broker", "sqlite"],
    ] {
        let output = output(demo(wrong, dir.path()));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{wrong:?}: {said}");
        assert!(!said.contains("secret"), "{said}");
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
        let output = output(demo(wrong, dir.path()));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
}

#[test]
fn servers_that_are_not_there_are_said_to_be_so_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--store", NO_STORE, "--broker", NO_BROKER];
    let output = output(demo(&arguments, dir.path()));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("the server of --store runs"), "{said}");
    assert!(!said.contains("secret"), "{said}");
}

#[tokio::test]
async fn without_rabbitmq_nothing_is_made_in_postgresql() {
    let dir = tempfile::tempdir().unwrap();
    let owner = Owner::create(&servers().0).await;
    let arguments = ["--store", &owner.url, "--broker", NO_BROKER];
    let output = output(demo(&arguments, dir.path()));
    assert_eq!(owner.remove().await, [""; 0]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("the server of --broker runs"), "{said}");
    assert!(!said.contains("secret"), "{said}");
}

#[test]
fn a_folder_of_a_former_run_is_refused_before_any_server_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("service.db"), "").unwrap();
    let keep = dir.path().to_str().unwrap();
    let arguments = ["--store", NO_STORE, "--broker", NO_BROKER, "--keep", keep];
    let output = output(demo(&arguments, dir.path()));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("former run"), "{said}");
}

#[tokio::test]
async fn a_run_that_cannot_say_what_it_does_leaves_no_database_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (store, broker) = servers();
    let owner = Owner::create(&store).await;
    let mut full = demo(&["--store", &owner.url, "--broker", &broker], dir.path());
    full.stdout(OpenOptions::new().write(true).open("/dev/full").unwrap());
    let output = output(full);
    assert_eq!(owner.remove().await, [""; 0]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("cannot write the result"), "{said}");
}
