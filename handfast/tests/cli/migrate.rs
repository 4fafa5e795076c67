//! Schemas are applied once, or printed for a person.

use handfast_migrations::{Database, Owner};
use sqlx::ConnectOptions as _;

use crate::process::{command, folder, line_of, output, printed, refused};
use handfast_scratch::Scratch;

#[tokio::test]
async fn migrating_twice_applies_nothing_the_second_time() {
    let folder = folder("");
    let arguments = ["migrate", "--store", "sqlite:other.db", "--json"];
    let first: serde_json::Value =
        serde_json::from_str(&printed(folder.path(), &arguments).await).unwrap();
    assert!(first["applied"].as_u64().unwrap() >= 1, "{first}");
    let second: serde_json::Value =
        serde_json::from_str(&printed(folder.path(), &arguments).await).unwrap();
    assert_eq!(second["applied"], 0);
    assert_eq!(second["version"], first["version"]);
    assert!(folder.path().join("other.db").exists());
}

#[tokio::test]
async fn without_a_store_the_one_of_the_configuration_is_migrated() {
    let folder = folder("[server]\nstore = \"sqlite:mine.db\"\n");
    let said = printed(folder.path(), &["migrate"]).await;
    assert!(said.contains("mine.db is at version"), "{said}");
    let said = printed(folder.path(), &["migrate"]).await;
    assert!(said.contains("mine.db is up to date"), "{said}");
}

#[tokio::test]
async fn printing_touches_nothing_and_needs_no_configuration() {
    let empty = tempfile::tempdir().unwrap();
    for (owner, table) in [
        ("message-service", "handfast_service_version"),
        ("fence", "handfast_fence_version"),
        ("inbox", "handfast_inbox_version"),
    ] {
        let print = ["migrate", "--print", "--owner", owner];
        let sql = printed(empty.path(), &print).await;
        assert!(sql.contains(table) && sql.contains("COMMIT;"), "{sql}");
        let print = [&print[..], &["--database", "postgres"]].concat();
        let sql = printed(empty.path(), &print).await;
        assert!(sql.contains(table) && sql.contains("timestamptz"), "{sql}");
    }
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_store_on_postgresql_is_migrated_once() {
    let scratch = Scratch::create().await;
    let empty = tempfile::tempdir().unwrap();
    let url = scratch.options().to_url_lossy().to_string();
    let arguments = ["migrate", "--store", &url, "--json"];
    let steps = Owner::MessageService.steps(Database::Postgres).len();
    for applied in [steps, 0] {
        let said: serde_json::Value =
            serde_json::from_str(&printed(empty.path(), &arguments).await).unwrap();
        assert_eq!(said["applied"], applied);
        assert_eq!(
            said["version"],
            Owner::MessageService.latest(Database::Postgres)
        );
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_without_its_password() {
    let empty = tempfile::tempdir().unwrap();
    let url = "postgres://me:secret@127.0.0.1:1/shop";
    let (code, line) = refused(empty.path(), &["migrate", "--store", url]).await;
    assert_eq!(code, 1);
    assert!(
        line.contains("cannot open the store postgres://127.0.0.1:1/shop"),
        "{line}"
    );
    assert!(!line.contains("secret"), "{line}");
}

#[tokio::test]
async fn a_store_on_postgresql_may_be_named_by_the_configuration() {
    let scratch = Scratch::create().await;
    let options = scratch.options();
    let folder = folder(&format!(
        "[server]\nstore = \"{}\"\nbroker = \"amqp://guest:guest@127.0.0.1:5672/%2f\"\n",
        options.to_url_lossy()
    ));
    let version = Owner::MessageService.latest(Database::Postgres);
    let name = options.get_database().unwrap();
    for _ in 0..2 {
        let said = printed(folder.path(), &["migrate"]).await;
        assert!(said.contains(name), "{said}");
        assert!(said.contains(&format!("at version {version}")), "{said}");
    }
}

#[tokio::test]
async fn the_environment_may_name_the_broker_as_it_may_for_serve() {
    let scratch = Scratch::create().await;
    let url = scratch.options().to_url_lossy();
    let folder = folder(&format!("[server]\nstore = \"{url}\"\n"));
    let mut migrate = command(folder.path(), &["migrate", "--json"]);
    migrate.env("HANDFAST_BROKER", "amqp://guest:guest@127.0.0.1:5672/%2f");
    let output = output(migrate).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let steps = Owner::MessageService.steps(Database::Postgres).len();
    assert_eq!(said["applied"], steps);
}

#[tokio::test]
async fn what_serve_refuses_in_its_environment_is_refused_by_migrate_too() {
    let folder = folder("[server]\nstore = \"sqlite:mine.db\"\n");
    for (variable, value, says) in [
        (
            "HANDFAST_BROKER",
            "amqp://u:secret@mq",
            "do not go together",
        ),
        ("HANDFAST_LEASE_MS", "long", "'long'"),
    ] {
        let mut migrate = command(folder.path(), &["migrate"]);
        migrate.env(variable, value);
        let (code, line) = line_of(&output(migrate).await);
        assert_eq!(code, 1, "{line}");
        assert!(line.contains(says) && !line.contains("secret"), "{line}");
    }
    assert!(!folder.path().join("mine.db").exists());
}
