//! How it ends: in good order when asked once, at once when asked twice.

use std::os::unix::process::ExitStatusExt as _;

use futures_util::future::join_all;
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{GetRequest, MessageState, NewMessage, PrepareRequest, get_result};
use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::process::{SOON, Serving, command, folder};

const TOPOLOGY: &str = "topology_version = 1\n\
    [[producer]]\nname = \"payment\"\nstatus_endpoint = \"http://127.0.0.1:1\"\n\
    [[topic]]\nname = \"payment.completed\"\nmay_have_no_subscriber = true\n";

/// Asks for health: an answer proves that the server has begun every earlier call on the
/// same connection.
async fn health(channel: &Channel) -> ServingStatus {
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
async fn a_hundred_prepares_in_flight_are_all_answered_and_kept() {
    const CALLS: u128 = 100;
    let folder = folder(TOPOLOGY);
    let mut slow = command(folder.path(), &["serve", "--listen", "127.0.0.1:0"]);
    // The first commit lasts long enough that all calls are in flight when the signal comes.
    slow.env(
        "HANDFAST_FAIL_POINTS",
        "service.prepare.before-commit=1*sleep(500)",
    );
    let serving = Serving::spawn(slow).await;
    let channel = serving.connect().await;
    let id = |n: u128| uuid::Uuid::from_u128(n + 1).as_bytes().to_vec();
    let calls = join_all((0..CALLS).map(|n| {
        let mut client = MessagesClient::new(channel.clone());
        let message = NewMessage {
            id: id(n),
            topic: "payment.completed".into(),
            payload: "{}".into(),
            ..NewMessage::default()
        };
        async move {
            let messages = vec![message];
            let producer = "payment".into();
            client.prepare(PrepareRequest { producer, messages }).await
        }
    }));
    tokio::pin!(calls);
    tokio::select! {
        biased;
        replies = &mut calls => panic!("answered too early to be in flight: {replies:?}"),
        status = health(&channel) => assert_eq!(status, ServingStatus::Serving),
    }
    serving.signal(Signal::SIGTERM);
    for reply in timeout(SOON, calls).await.unwrap() {
        let results = reply.unwrap().into_inner().results;
        assert_eq!(
            results[0].outcome,
            Some(Outcome::State(MessageState::Prepared.into()))
        );
    }
    assert_eq!(serving.end().await.0.code(), Some(0));

    let again = Serving::start(folder.path()).await;
    let mut client = MessagesClient::new(again.connect().await);
    let message_ids = (0..CALLS).map(id).collect();
    let producer = "payment".into();
    let kept = client
        .get(GetRequest {
            producer,
            message_ids,
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(kept.results.len(), 100);
    for result in kept.results {
        let Some(get_result::Outcome::Status(status)) = result.outcome else {
            panic!("{result:?}");
        };
        assert_eq!(status.state(), MessageState::Prepared);
    }
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
