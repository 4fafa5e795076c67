//! What is in force after a start: which source wins, which topology, who is healthy.

use nix::sys::signal::Signal;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::process::{Serving, command, folder, line_of, output, refused};

const SERVE: [&str; 3] = ["serve", "--listen", "127.0.0.1:0"];

#[tokio::test]
async fn a_flag_wins_over_the_environment_and_the_environment_over_the_file() {
    let folder = folder("[server]\nlisten = \"127.0.0.1:0\"\n");
    let mut environment = command(folder.path(), &["serve"]);
    environment.env("HANDFAST_LISTEN", "nowhere");
    let (code, line) = line_of(&output(environment).await);
    assert_eq!(code, 1);
    assert!(line.starts_with("--listen or HANDFAST_LISTEN: "), "{line}");

    let mut flag = command(folder.path(), &SERVE);
    flag.env("HANDFAST_LISTEN", "nowhere");
    Serving::spawn(flag).await;

    // The store's lock ends with the process, and dropping has only asked for that.
    let mut named = command(folder.path(), &["serve", "--store", "sqlite:second.db"]);
    named.env("HANDFAST_CONFIG", folder.path().join("handfast.toml"));
    named.env("HANDFAST_LOG_FORMAT", "json");
    named.env("HANDFAST_LOG", "info");
    let serving = Serving::spawn(named).await;
    assert!(
        serving.before.iter().all(|line| line.starts_with('{')),
        "{:?}",
        serving.before
    );
}

#[tokio::test]
async fn every_service_is_healthy_once_it_serves() {
    let folder = folder("");
    let serving = Serving::start(folder.path()).await;
    let mut health = HealthClient::new(serving.connect().await);
    for name in [
        "",
        "handfast.v1.Messages",
        "handfast.v1.Deliveries",
        "handfast.v1.Console",
    ] {
        let service = name.to_owned();
        let reply = health.check(HealthCheckRequest { service }).await.unwrap();
        assert_eq!(
            reply.into_inner().status(),
            ServingStatus::Serving,
            "{name}"
        );
    }
}

#[tokio::test]
async fn an_older_topology_is_logged_and_not_applied_and_a_reused_version_is_refused() {
    let topology = |version: u32, topic: &str| {
        format!(
            "topology_version = {version}\n[[topic]]\nname = \"{topic}\"\n\
             may_have_no_subscriber = true\n"
        )
    };
    let folder = folder(&topology(2, "first"));
    let file = folder.path().join("handfast.toml");
    let stop = async |serving: Serving| {
        serving.signal(Signal::SIGTERM);
        assert!(serving.end().await.0.success());
    };
    let serving = Serving::start(folder.path()).await;
    assert!(
        serving
            .before
            .iter()
            .any(|line| line.contains("topology 2 is in force now"))
    );
    stop(serving).await;

    std::fs::write(&file, topology(1, "second")).unwrap();
    let serving = Serving::start(folder.path()).await;
    assert!(
        serving
            .before
            .iter()
            .any(|line| line.contains("topology 1 is older than 2"))
    );
    stop(serving).await;

    std::fs::write(&file, topology(2, "second")).unwrap();
    let (code, line) = refused(folder.path(), &SERVE).await;
    assert_eq!(code, 1);
    assert!(line.contains("raise topology_version"), "{line}");
}
