//! Throwaway means: beside each other, on loopback only, and gone afterwards.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use handfast_servers::{Options, Postgres, RabbitMq, start_both};

#[test]
fn two_of_each_run_beside_each_other_and_listen_on_loopback_only() {
    let (one, other) = thread::scope(|scope| {
        let one = scope.spawn(start_both);
        let other = start_both().unwrap();
        (one.join().unwrap().unwrap(), other)
    });
    one.0.sql("postgres", "CREATE DATABASE mine").unwrap();
    let databases = "SELECT count(*) FROM pg_database WHERE datname = 'mine'";
    assert_eq!(other.0.sql("postgres", databases).unwrap(), "0");
    assert_eq!(one.0.sql("mine", "SELECT 1").unwrap(), "1");
    one.1.ctl(&["add_vhost", "mine"]).unwrap();
    assert_eq!(other.1.ctl(&["list_vhosts", "name"]).unwrap(), "/");
    let members = one.1.eval("rabbit_nodes:all_running().").unwrap();
    assert_eq!(members.matches('@').count(), 1, "{members}");

    for folder in [
        one.0.folder(),
        one.1.folder(),
        other.0.folder(),
        other.1.folder(),
    ] {
        let addresses = listening(folder);
        assert!(!addresses.is_empty(), "{}", folder.display());
        let open: Vec<_> = addresses
            .iter()
            .filter(|address| !address.is_loopback())
            .collect();
        assert!(open.is_empty(), "{}: {open:?}", folder.display());
    }
}

#[test]
fn nothing_listens_elsewhere_while_a_node_starts_and_is_asked() {
    let parent = tempfile::tempdir().unwrap();
    let options = Options::new().within(parent.path());
    let seen = thread::scope(|scope| {
        let work = scope.spawn(|| {
            let node = RabbitMq::start_with(&options).unwrap();
            node.ctl(&["list_vhosts"]).unwrap();
        });
        let mut seen = HashSet::new();
        while !work.is_finished() {
            seen.extend(listening(&parent.path().canonicalize().unwrap()));
        }
        work.join().unwrap();
        seen
    });
    assert!(!seen.is_empty());
    assert!(seen.iter().all(IpAddr::is_loopback), "{seen:?}");
}

#[test]
fn killed_and_started_again_they_keep_what_is_durable() {
    let (mut postgres, mut rabbitmq) = start_both().unwrap();
    let (urls, pids) = (
        (postgres.admin_url(), rabbitmq.url()),
        (postgres.pid().unwrap(), rabbitmq.pid().unwrap()),
    );
    postgres
        .sql("postgres", "CREATE TABLE kept AS SELECT 42 AS n")
        .unwrap();
    rabbitmq.ctl(&["add_vhost", "kept"]).unwrap();

    postgres.kill().unwrap();
    rabbitmq.kill().unwrap();
    for port in [postgres.port(), rabbitmq.port()] {
        assert!(!connects(port), "port {port} answers after the kill");
    }
    postgres.start_again().unwrap();
    rabbitmq.start_again().unwrap();
    assert_eq!((postgres.admin_url(), rabbitmq.url()), urls);
    assert_ne!(postgres.pid().unwrap(), pids.0);
    assert_ne!(rabbitmq.pid().unwrap(), pids.1);
    assert_eq!(
        postgres.sql("postgres", "SELECT n FROM kept").unwrap(),
        "42"
    );
    assert_eq!(rabbitmq.ctl(&["list_vhosts", "name"]).unwrap(), "/\nkept");

    postgres.stop().unwrap();
    rabbitmq.stop().unwrap();
    postgres.start_again().unwrap();
    rabbitmq.start_again().unwrap();
    assert_eq!(
        postgres.sql("postgres", "SELECT n FROM kept").unwrap(),
        "42"
    );
    assert_eq!(rabbitmq.ctl(&["list_vhosts", "name"]).unwrap(), "/\nkept");
}

#[test]
fn a_frozen_node_answers_nobody_until_it_is_thawed() {
    let rabbitmq = RabbitMq::start().unwrap();
    rabbitmq.freeze().unwrap();
    // The kernel still accepts, and then nobody answers.
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, rabbitmq.port())).unwrap();
    connection.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
    let briefly = Some(Duration::from_millis(500));
    connection.set_read_timeout(briefly).unwrap();
    let answer = connection.read(&mut [0]).unwrap_err();
    assert_eq!(answer.kind(), ErrorKind::WouldBlock);

    rabbitmq.thaw().unwrap();
    let patiently = Some(Duration::from_secs(10));
    connection.set_read_timeout(patiently).unwrap();
    assert_eq!(connection.read(&mut [0]).unwrap(), 1);
    assert_eq!(rabbitmq.eval("1 + 1.").unwrap(), "2");
    rabbitmq.freeze().unwrap();
}

#[test]
fn after_drop_nothing_is_left_even_if_it_was_killed_or_busy_or_frozen() {
    let (mut killed, rabbitmq) = start_both().unwrap();
    let busy = Postgres::start().unwrap();
    let segments = [shared_memory(&killed), shared_memory(&busy)];
    rabbitmq.freeze().unwrap();
    killed.kill().unwrap();
    let folders = [killed.folder(), busy.folder(), rabbitmq.folder()].map(Path::to_owned);
    let _connection = sleeping_statement(busy.port());
    until("the statement runs", || {
        let running = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(99)'";
        busy.sql("postgres", running).unwrap() == "1"
    });
    drop((killed, busy, rabbitmq));
    for folder in &folders {
        assert!(!folder.exists(), "{} is left", folder.display());
        assert_eq!(working_in(folder), Vec::<u32>::new());
    }
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap();
    for segment in &segments {
        let left = table
            .lines()
            .any(|line| line.split_whitespace().nth(1) == Some(segment));
        assert!(!left, "shared memory {segment} is left");
    }
}

#[test]
fn servers_end_when_their_owner_is_killed() {
    let mut owner = Command::new(env!("CARGO_BIN_EXE_servers-owner"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(owner.stdout.take().unwrap());
    let folders: Vec<_> = output
        .lines()
        .take(2)
        .map(|line| PathBuf::from(line.unwrap()))
        .collect();
    assert_eq!(folders.len(), 2, "the owner did not start them");
    for folder in &folders {
        assert!(!working_in(folder).is_empty());
    }
    // This is SIGKILL.
    owner.kill().unwrap();
    owner.wait().unwrap();
    for folder in &folders {
        until("the servers have ended and their folders are gone", || {
            working_in(folder).is_empty() && !folder.exists()
        });
    }
}

#[test]
fn settings_and_the_parent_folder_can_be_chosen() {
    let parent = tempfile::tempdir().unwrap();
    open_to_all(parent.path());
    let options = Options::new()
        .within(parent.path())
        .with_settings(&[("max_connections", "20")]);
    let postgres = Postgres::start_with(&options).unwrap();
    assert!(
        postgres
            .folder()
            .starts_with(parent.path().canonicalize().unwrap())
    );
    let setting = |name: &str| postgres.sql("postgres", &format!("SHOW {name}")).unwrap();
    assert_eq!(setting("max_connections"), "20");
    for durable in ["fsync", "full_page_writes", "synchronous_commit"] {
        assert_eq!(setting(durable), "on", "{durable}");
    }
    let unknown = Options::new().with_settings(&[("no_such_setting", "1")]);
    let refused = Postgres::start_with(&unknown).unwrap_err().to_string();
    assert!(
        refused.contains("no_such_setting"),
        "the log says why: {refused}"
    );
}

fn connects(port: u16) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}

fn until(what: &str, mut look: impl FnMut() -> bool) {
    let began = Instant::now();
    while !look() {
        assert!(began.elapsed() < Duration::from_secs(20), "not yet: {what}");
        thread::yield_now();
    }
}

/// A connection that has just sent a long statement, in PostgreSQL's own protocol.
fn sleeping_statement(port: u16) -> TcpStream {
    let message = |kind: &[u8], body: &[u8]| {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [kind, &length, body].concat()
    };
    let mut start = 0x0003_0000_u32.to_be_bytes().to_vec();
    start.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    connection.write_all(&message(b"", &start)).unwrap();
    let statement = message(b"Q", b"SELECT pg_sleep(99)\0");
    connection.write_all(&statement).unwrap();
    connection
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The processes whose current directory is in the folder.
fn working_in(folder: &Path) -> Vec<u32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
        })
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

/// The addresses at which these processes listen.
fn listening(folder: &Path) -> HashSet<IpAddr> {
    let sockets: HashSet<String> = working_in(folder)
        .into_iter()
        .filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok())
        .flat_map(Iterator::flatten)
        .filter_map(|file| fs::read_link(file.path()).ok())
        .filter_map(|target| {
            let name = target.to_str()?.strip_prefix("socket:[")?;
            Some(name.strip_suffix(']')?.to_owned())
        })
        .collect();
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| {
            let lines: Vec<_> = table.lines().skip(1).map(str::to_owned).collect();
            lines
        })
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let listens = words[3] == "0A" && sockets.contains(words[9]);
            listens.then(|| address(words[1].split_once(':').unwrap().0))
        })
        .collect()
}

/// As the kernel writes it: words of four bytes in the machine's own order.
fn address(hex: &str) -> IpAddr {
    let bytes: Vec<u8> = (0..hex.len() / 8)
        .flat_map(|word| {
            let word = u32::from_str_radix(&hex[word * 8..][..8], 16).unwrap();
            word.to_ne_bytes()
        })
        .collect();
    match bytes.as_slice().try_into() {
        Ok::<[u8; 4], _>(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("four or sixteen bytes")),
    }
}

/// The id of the shared memory that it has outside of its folder.
fn shared_memory(postgres: &Postgres) -> String {
    let lock = fs::read_to_string(postgres.folder().join("data/postmaster.pid")).unwrap();
    let segment = lock.lines().nth(6).unwrap().split_whitespace().nth(1);
    segment.unwrap().to_owned()
}
