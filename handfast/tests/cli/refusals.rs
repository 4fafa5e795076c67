//! What is wrong is one line with the way out, and the right exit code.

use crate::process::{Serving, command, folder, printed, refused};

const SERVE: [&str; 3] = ["serve", "--listen", "127.0.0.1:0"];

#[tokio::test]
async fn a_wrong_call_is_one_line_and_exit_code_2() {
    let empty = tempfile::tempdir().unwrap();
    for (arguments, says) in [
        (&["serve", "--lissen", "x"] as &[_], "'--lissen'"),
        (&["serve", "--lease-ms", "long"], "'long'"),
        (&["serve", "extra"], "'extra'"),
        (&["servant"], "'servant'"),
        (
            &["migrate", "--print", "--owner", "nobody"],
            "use message-service, fence, inbox",
        ),
        (&["migrate", "--print", "--json"], "'--json'"),
        (
            &["migrate", "postgres://me:secret@db/shop"],
            "'postgres://…@db/shop'",
        ),
        (&[], "no subcommand"),
    ] {
        let (code, line) = refused(empty.path(), arguments).await;
        assert_eq!(code, 2, "{line}");
        assert!(line.contains(says) && line.contains("--help"), "{line}");
        assert!(!line.contains("secret"), "{line}");
    }
}

#[tokio::test]
async fn help_has_an_example_and_goes_to_standard_output() {
    let empty = tempfile::tempdir().unwrap();
    for (arguments, example) in [
        (&["--help"] as &[_], "handfast serve --config handfast.toml"),
        (
            &["serve", "--help"],
            "handfast serve --config handfast.toml",
        ),
        (
            &["migrate", "--help"],
            "handfast migrate --store sqlite:handfast.db",
        ),
    ] {
        let help = printed(empty.path(), arguments).await;
        assert!(help.contains("Example") && help.contains(example), "{help}");
    }
    let version = printed(empty.path(), &["--version"]).await;
    assert!(version.starts_with("handfast "), "{version}");
}

#[tokio::test]
async fn a_configuration_that_is_missing_or_wrong_is_refused_before_anything_is_touched() {
    let empty = tempfile::tempdir().unwrap();
    let (code, line) = refused(empty.path(), &SERVE).await;
    assert_eq!(code, 1);
    assert!(
        line.contains("no configuration file handfast.toml"),
        "{line}"
    );
    assert!(line.contains("--config FILE"), "{line}");

    for (config, says) in [
        (
            "[server]\nlissen = 1\n",
            "handfast.toml:2: unknown key `lissen`",
        ),
        (
            "[server]\nstore = \"postgres://u:secret@db\"\n",
            "do not go together",
        ),
        (
            "[server]\nstore = \"postgres://u:secret@db\"\nbroker = \"amqp://u:secret@mq\"\n",
            "names no database",
        ),
        (
            "[[producer]]\nname = \"payment\"\n",
            "handfast.toml:1: [[producer]] needs",
        ),
    ] {
        let folder = folder(config);
        let (code, line) = refused(folder.path(), &SERVE).await;
        assert_eq!(code, 1);
        assert!(line.contains(says), "{line}");
        assert!(!line.contains("secret"), "{line}");
        let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(files.len(), 1, "{files:?}");
    }
}

#[tokio::test]
async fn a_taken_port_is_refused_before_the_store_is_touched() {
    let folder = folder("");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, line) = refused(folder.path(), &["serve", "--listen", &address]).await;
    assert_eq!(code, 1);
    assert!(
        line.contains(&format!("cannot serve on {address}")),
        "{line}"
    );
    assert!(line.contains("--listen"), "{line}");
    assert!(!folder.path().join("handfast.db").exists());
}

#[tokio::test]
async fn an_address_that_strangers_reach_has_to_be_asked_for() {
    let folder = folder("");
    let (code, line) = refused(folder.path(), &["serve", "--listen", "0.0.0.0:0"]).await;
    assert_eq!(code, 1);
    assert!(line.contains("--insecure-listen"), "{line}");
    let open = ["serve", "--listen", "0.0.0.0:0", "--insecure-listen"];
    let serving = Serving::spawn(command(folder.path(), &open)).await;
    assert!(serving.address.starts_with("0.0.0.0:"));
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_refused_with_its_line() {
    let folder = folder("");
    let serving = Serving::start(folder.path()).await;
    for arguments in [&SERVE as &[_], &["migrate"]] {
        let (code, line) = refused(folder.path(), arguments).await;
        assert_eq!(code, 1);
        assert!(line.contains("another handfast holds its lock"), "{line}");
    }
    drop(serving);

    let lost = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--store",
        "sqlite:no/such/folder.db",
    ];
    let (code, line) = refused(folder.path(), &lost).await;
    assert_eq!(code, 1);
    assert!(
        line.contains("folder that exists and can be written"),
        "{line}"
    );
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    use sqlx::Connection as _;
    let folder = folder("");
    printed(folder.path(), &["migrate"]).await;
    let url = format!("sqlite:{}", folder.path().join("handfast.db").display());
    let mut db = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query("INSERT INTO handfast_service_version (version, name) VALUES (99, 'later')")
        .execute(&mut db)
        .await
        .unwrap();
    db.close().await.unwrap();
    let (code, line) = refused(folder.path(), &SERVE).await;
    assert_eq!(code, 1);
    assert!(
        line.contains("version 99") && line.contains("newer program"),
        "{line}"
    );
}
