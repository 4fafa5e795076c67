//! `cargo xtask up`, as its user meets it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

#[test]
fn up_says_where_the_servers_are_and_leaves_nothing_when_it_is_told_to_stop() {
    let folder = tempfile::tempdir().unwrap();
    // PostgreSQL may run as another user.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut up = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("up")
        .env("TMPDIR", folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = Vec::new();
    for line in BufReader::new(up.stdout.take().unwrap()).lines() {
        lines.push(line.unwrap());
        if lines.last().is_some_and(|line| line.contains(" serve ")) {
            break;
        }
    }
    let url = |scheme: &str| {
        let found = lines.iter().find(|line| line.starts_with(scheme));
        found.unwrap_or_else(|| panic!("no {scheme} in {lines:?}"))
    };
    let (postgres, amqp) = (url("postgres://"), url("amqp://"));
    let demo = format!("demo --store {postgres} --broker {amqp}");
    assert!(lines.iter().any(|line| line.contains(&demo)), "{lines:?}");
    let addresses = [postgres, amqp].map(|url| {
        let address = url.split_once('@').unwrap().1;
        address.split_once('/').unwrap().0.to_owned()
    });
    for address in &addresses {
        TcpStream::connect(address).unwrap();
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);

    let pid = Pid::from_raw(i32::try_from(up.id()).unwrap());
    signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(up.wait().unwrap().code(), Some(0));
    for address in &addresses {
        assert!(TcpStream::connect(address).is_err(), "{address} answers");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
