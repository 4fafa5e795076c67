//! How it ends: in good order when asked once, at once when asked twice.

use std::os::unix::process::ExitStatusExt as _;

use handfast_proto::v1::deliveries_client::DeliveriesClient;
use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::process::{SOON, Serving, command, folder};

/// One producer that may prepare on one topic.
pub(crate) const TOPOLOGY: &str = "topology_version = 1\n\
    [[producer]]\nname = \"payment\"\nstatus_endpoint = \"http://127.0.0.1:1\"\n\
    [[topic]]\nname = \"payment.completed\"\nmay_have_no_subscriber = true\n";

/// Asks for health: an answer proves that the server has begun every earlier call on the
/// same connection.
pub(crate) async fn health(channel: &Channel) -> ServingStatus {
    let mut client = HealthClient::new(channel.clone());
    let reply = client.check(HealthCheckRequest::default()).await.unwrap();
    reply.into_inner().status()
}

#[tokio::test]
async fn sigterm_and_ctrl_c_end_with_0_and_watchers_see_it_first() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = folder(TOPOLOGY);
        let serving = Serving::start(folder.path()).await;
        let mut client = HealthClient::new(serving.connect().await);
        let watch = client.watch(HealthCheckRequest::default()).await.unwrap();
        let mut watch = watch.into_inner();
        let first = watch.message().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::Serving);

        serving.signal(signal);
        let next = timeout(SOON, watch.message()).await.unwrap();
        assert_eq!(next.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert!(
            timeout(SOON, watch.message())
                .await
                .unwrap()
                .unwrap()
                .is_none()
        );
        let (status, said) = serving.end().await;
        assert_eq!(status.code(), Some(0), "{said:?}");
        assert!(said.last().unwrap().contains("stopped"), "{said:?}");
        assert!(!said.iter().any(|line| line.contains("WARN")), "{said:?}");
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_any_more_does_not_keep_it_from_stopping() {
    let folder = folder(TOPOLOGY);
    let serving = Serving::start(folder.path()).await;
    let status = serving.end_unheard(Signal::SIGTERM).await;
    assert_eq!(status.code(), Some(0));
}

/// Opens a call that the server cannot finish, and returns once the server has begun it.
async fn hang(channel: &Channel) -> tokio::task::JoinHandle<()> {
    let mut client = DeliveriesClient::new(channel.clone());
    let mut call = Box::pin(async move {
        // The first request says what to open, and it never comes.
        let _ = client.consume(tokio_stream::pending()).await;
    });
    tokio::select! {
        biased;
        () = &mut call => panic!("the call ended"),
        _ = health(channel) => {}
    }
    tokio::spawn(call)
}

#[tokio::test]
async fn a_call_that_does_not_end_is_cut_off_at_the_deadline() {
    let folder = folder(TOPOLOGY);
    let arguments = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--shutdown-deadline-s",
        "1",
    ];
    let serving = Serving::spawn(command(folder.path(), &arguments)).await;
    let channel = serving.connect().await;
    let call = hang(&channel).await;
    let asked = Instant::now();
    serving.signal(Signal::SIGTERM);
    let (status, said) = serving.end().await;
    assert_eq!(status.code(), Some(0), "{said:?}");
    assert!(said.iter().any(|line| line.contains("cut off")), "{said:?}");
    // The server itself would wait 10 s for the first request.
    assert!(asked.elapsed().as_secs() < 8, "{said:?}");
    timeout(SOON, call).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let folder = folder(TOPOLOGY);
        let mut serving = Serving::start(folder.path()).await;
        let channel = serving.connect().await;
        let call = hang(&channel).await;
        serving.signal(Signal::SIGTERM);
        serving.logs("once more ends at once").await;
        serving.signal(signal);
        let (status, said) = serving.end().await;
        assert_eq!(status.code(), Some(code), "{:?} {said:?}", status.signal());
        assert!(
            !said.iter().any(|line| line.contains("stopped")),
            "{said:?}"
        );
        timeout(SOON, call).await.unwrap().unwrap();
    }
}
