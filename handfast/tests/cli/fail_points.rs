//! What needs fail points, which a build without the demo does not have.

use futures_util::future::join_all;
use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{GetRequest, MessageState, NewMessage, PrepareRequest, get_result};
use nix::sys::signal::Signal;
use tokio::time::timeout;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::process::{SOON, Serving, command, folder, line_of, output};
use crate::signals::{TOPOLOGY, health};

const SERVE: [&str; 3] = ["serve", "--listen", "127.0.0.1:0"];

#[tokio::test]
async fn a_hundred_prepares_in_flight_are_all_answered_and_kept() {
    const CALLS: u128 = 100;
    let folder = folder(TOPOLOGY);
    let mut slow = command(folder.path(), &SERVE);
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

#[tokio::test]
async fn a_fail_point_that_does_not_exist_is_refused() {
    let folder = folder("");
    let mut armed = command(folder.path(), &SERVE);
    armed.env("HANDFAST_FAIL_POINTS", "service.nothing=abort@1");
    let (code, line) = line_of(&output(armed).await);
    assert_eq!(code, 1);
    assert!(line.contains("no fail point `service.nothing`"), "{line}");
}
