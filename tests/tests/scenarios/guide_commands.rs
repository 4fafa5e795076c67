//! Every command of the README and the guide is run as it stands there. A command that this test
//! does not know fails it, so that none can be added and forgotten.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use handfast_servers::RabbitMq;
use handfast_tests::process::Process;
use handfast_tests::{eventually, world};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(30);

/// A document: its name, its shell commands, and its first configuration.
struct Document {
    name: String,
    commands: Vec<String>,
    config: String,
}

fn documents() -> Vec<Document> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("README.md")];
    let guide = std::fs::read_dir(root.join("docs/guide")).unwrap();
    files.extend(guide.map(|entry| entry.unwrap().path()));
    files.sort();
    files.iter().map(|file| document(file)).collect()
}

fn document(file: &Path) -> Document {
    let text = std::fs::read_to_string(file).unwrap();
    let blocks = |kind: &str| -> Vec<String> {
        let begin = format!("```{kind}\n");
        text.split(&begin)
            .skip(1)
            .map(|rest| rest.split("```").next().unwrap().to_owned())
            .collect()
    };
    let mut commands: Vec<String> = blocks("sh")
        .iter()
        .flat_map(|block| {
            let joined = block.replace("\\\n", " ");
            joined.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    // In a sentence only those that end by themselves stand for themselves.
    let inline = text.split('`').skip(1).step_by(2);
    commands.extend(
        inline
            .filter(|code| code.starts_with("handfast "))
            .filter(|code| !code.starts_with("handfast serve") || code.contains("--help"))
            .filter(|code| !code.contains("URL"))
            .map(str::to_owned),
    );
    commands.retain(|line| !line.trim().is_empty());
    let config = blocks("toml")
        .into_iter()
        .find(|text| text.contains("[[producer]]"));
    Document {
        name: file.file_name().unwrap().to_string_lossy().into_owned(),
        commands,
        config: config.unwrap_or_default(),
    }
}

/// Splits as a shell does, as far as the documents need it.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, ' ') => words.push(String::new()),
            (_, c) => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[tokio::test]
async fn every_command_of_the_guide_works_as_it_stands_there() {
    let mut run = 0;
    for document in documents() {
        let folder = TempDir::with_prefix("handfast-guide-").unwrap();
        std::fs::write(folder.path().join("handfast.toml"), &document.config).unwrap();
        for line in &document.commands {
            eprintln!("{}: {line}", document.name);
            carry_out(&words(line), folder.path()).await;
            run += 1;
        }
    }
    assert!(run >= 12, "only {run} commands were found");
}

async fn carry_out(words: &[String], folder: &Path) {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        // This test is part of the first; the second has a test of its own beside it.
        ["cargo", "xtask", "test" | "up"] => {}
        ["cargo", "run", "--release", "--", "demo"] => {
            let few = ["demo", "--payments", "5"];
            succeeds(
                Command::new(world::handfast())
                    .args(few)
                    .current_dir(folder),
            );
        }
        ["cargo", "run", "--release", "--", "serve", ref rest @ ..] => {
            let mut serve = Command::new(world::handfast());
            serve
                .arg("serve")
                .args(rest)
                .env("HANDFAST_LISTEN", "127.0.0.1:0");
            starts_and_stops("serve", serve, folder, "serving on").await;
        }
        ["cargo", "run", "--release", "-p", package, ref rest @ ..] => {
            // The tested program has the reference services in it, behind the same flags.
            let mut command = Command::new(world::handfast());
            command
                .args(["demo-party", package])
                .args(rest.iter().skip(1))
                .env("PAYMENT_LISTEN", "127.0.0.1:0")
                .env("PAYMENT_STATUS_LISTEN", "127.0.0.1:0");
            starts_and_stops(package, command, folder, "").await;
        }
        ["sqlite3", ..] => succeeds(Command::new(words[0]).args(&words[1..]).current_dir(folder)),
        ["handfast", ref rest @ ..] => {
            succeeds(
                Command::new(world::handfast())
                    .args(rest)
                    .current_dir(folder),
            );
        }
        ["rabbitmqctl", "set_permissions", "handfast", ..] => enough_rights(&words).await,
        _ => panic!("no test knows how to run {words:?}"),
    }
}

fn succeeds(command: &mut Command) {
    let Output { status, stderr, .. } = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?} ended with {status}: {said}");
}

/// Starts it, waits until it says that it works or at least anything, and stops it.
async fn starts_and_stops(name: &str, mut command: Command, folder: &Path, says: &str) {
    let log = folder.join(format!("{name}.log"));
    let before = read(&log).len();
    command.current_dir(folder);
    let mut process = Process::start(name, command, &log);
    eventually(format!("{name} works"), SOON, async || {
        if let Some(status) = process.ended() {
            panic!("{name} ended with {status}: {}", read(&log));
        }
        let said = read(&log).split_off(before);
        (!said.is_empty() && said.contains(says))
            .then_some(())
            .ok_or(said)
    })
    .await;
    process.stop().await;
}

fn read(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

/// A service whose user has just these rights makes its queues and takes answers.
async fn enough_rights(words: &[&str]) {
    let words: Vec<String> = words[1..].iter().map(|&word| word.to_owned()).collect();
    let rabbitmq = tokio::task::spawn_blocking(move || {
        let rabbitmq = RabbitMq::start().unwrap();
        rabbitmq.ctl(&["add_user", "handfast", "secret"]).unwrap();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        rabbitmq.ctl(&words).unwrap();
        rabbitmq
    })
    .await
    .unwrap();
    let (server, name) = (
        postgres(),
        format!("guide_{}", uuid::Uuid::now_v7().simple()),
    );
    let mut admin = PgConnection::connect_with(&server).await.unwrap();
    let make = AssertSqlSafe(format!("CREATE DATABASE {name}"));
    sqlx::query(make).execute(&mut admin).await.unwrap();
    let folder = TempDir::with_prefix("handfast-guide-").unwrap();
    let mut serve = Command::new(world::handfast());
    serve
        .arg("serve")
        .env("HANDFAST_LISTEN", "127.0.0.1:0")
        .env(
            "HANDFAST_STORE",
            server.database(&name).to_url_lossy().as_str(),
        )
        .env(
            "HANDFAST_BROKER",
            format!("amqp://handfast:secret@127.0.0.1:{}/%2f", rabbitmq.port()),
        );
    let config = "topology_version = 1\n[[topic]]\nname = \"t\"\n\
                  [[subscription]]\nname = \"accounting\"\ntopic = \"t\"\n";
    std::fs::write(folder.path().join("handfast.toml"), config).unwrap();
    starts_and_stops("serve", serve, folder.path(), "serving on").await;
    let drop = AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"));
    sqlx::query(drop).execute(&mut admin).await.unwrap();
    let said = read(&folder.path().join("serve.log"));
    assert!(!said.contains("ACCESS_REFUSED"), "{said}");
    let queues =
        tokio::task::spawn_blocking(move || rabbitmq.ctl(&["list_queues", "name"]).unwrap());
    let queues = queues.await.unwrap();
    for queue in [
        "handfast.accounting",
        "handfast.acknowledge",
        "handfast.mark",
    ] {
        assert!(queues.contains(queue), "{queues}");
    }
}

/// The server that tests use. Without one they fail: there is nothing else they could say.
fn postgres() -> PgConnectOptions {
    let url = std::env::var("HANDFAST_TEST_POSTGRES").unwrap_or_else(|_| {
        panic!("HANDFAST_TEST_POSTGRES is not set; run `cargo xtask test`, or name a server")
    });
    url.parse().unwrap()
}
