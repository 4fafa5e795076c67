//! Limits of the whole service, and callers that go away.

use handfast_proto::v1 as proto;
use handfast_service::service::Settings;
use tonic::Code;
use tonic_types::{RpcStatusExt as _, StatusExt as _};

use crate::world::*;

#[tokio::test]
async fn a_producer_leaves_no_more_undecided_than_it_may() {
    let mut world = World::with(Settings {
        max_undecided: 3,
        ..Settings::default()
    })
    .await;
    let many: Vec<_> = (1..=5).map(a_message).collect();
    let results = world.prepare("payment", many).await.unwrap();
    for kept in &results[..3] {
        assert_eq!(state(kept), proto::MessageState::Prepared);
    }
    for refused in &results[3..] {
        let (code, status) = refusal(refused);
        assert_eq!(code, Code::ResourceExhausted);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "TOO_MANY_UNDECIDED");
        assert!(status.get_details_retry_info().is_some());
    }
    let other = world.prepare("orders", vec![a_message(6)]).await.unwrap();
    assert_eq!(state(&other[0]), proto::MessageState::Prepared);

    world.confirm("payment", vec![an_id(1)]).await.unwrap();
    let results = world
        .prepare("payment", vec![a_message(4), a_message(5)])
        .await
        .unwrap();
    assert_eq!(state(&results[0]), proto::MessageState::Prepared);
    assert_eq!(refusal(&results[1]).0, Code::ResourceExhausted);
}

#[tokio::test]
async fn many_prepares_at_once_do_not_pass_the_limit_together() {
    let mut world = World::with(Settings {
        max_undecided: 20,
        ..Settings::default()
    })
    .await;
    let calls = (0..40).map(|n: u128| {
        let mut messages = world.messages.clone();
        async move {
            let request = proto::PrepareRequest {
                producer: "payment".into(),
                messages: vec![a_message(2 * n + 1), a_message(2 * n + 2)],
            };
            messages.prepare(request).await.unwrap()
        }
    });
    futures_util::future::join_all(calls).await;
    // What was kept while it was counted took its place twice, so there may be room left.
    assert!(world.counts().await.prepared <= 20);
    let more = (101..=120).map(a_message).collect();
    world.prepare("payment", more).await.unwrap();
    assert_eq!(world.counts().await.prepared, 20, "all of it can be used");
}

#[tokio::test]
async fn a_full_store_takes_nothing_new_and_finishes_what_is_there() {
    let mut world = World::with(Settings {
        max_backlog_bytes: 0,
        ..Settings::default()
    })
    .await;
    // Kept while there was room.
    let kept = handfast_service::message::NewMessage {
        id: message_id(1),
        producer: "payment".into(),
        topic: TOPIC.into(),
        key: None,
        content_type: String::new(),
        headers: Vec::new(),
        payload: Vec::new(),
        deliver_after: None,
        fence: None,
    };
    use handfast_service::store::Store as _;
    world.store.prepare(vec![kept], DEADLINE).await.unwrap();

    for refused in [
        world.prepare("payment", vec![a_message(2)]).await,
        world.publish("payment", vec![a_message(2)]).await,
    ] {
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "BACKLOG_FULL");
        assert!(status.get_details_retry_info().is_some());
    }
    let confirmed = world.confirm("payment", vec![an_id(1)]).await.unwrap();
    assert_eq!(state(&confirmed[0]), proto::MessageState::Confirmed);
    let answer = vec![an_answer(1, 1, proto::AnswerKind::Consumed)];
    let results = world.acknowledge("accounting", answer).await.unwrap();
    assert_eq!(results[0].outcome(), proto::AnswerOutcome::Recorded);
}

#[tokio::test]
async fn bodies_in_flight_are_bounded_and_confirms_pass() {
    // Room for one body at a time: of many calls at once some are refused, none is half-done.
    let mut world = World::with(Settings {
        inflight_bytes: 1,
        ..Settings::default()
    })
    .await;
    let calls = (1..=50).map(|id: u128| {
        let mut messages = world.messages.clone();
        async move {
            let request = proto::PrepareRequest {
                producer: "payment".into(),
                messages: vec![a_message(id)],
            };
            messages.prepare(request).await.map(|_| id)
        }
    });
    let results = futures_util::future::join_all(calls).await;
    let (kept, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    for status in refused {
        let status = status.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.get_details_retry_info().is_some());
    }
    assert!(!kept.is_empty());
    assert_eq!(world.kept().await, kept.len() as u64);
    for id in kept {
        let confirmed = world.confirm("payment", vec![an_id(id.unwrap())]).await;
        assert_eq!(
            state(&confirmed.unwrap()[0]),
            proto::MessageState::Confirmed
        );
    }
}

#[tokio::test]
async fn a_call_whose_client_goes_away_is_done_or_not_done_as_a_whole() {
    let mut world = World::start().await;
    for round in 0..20u128 {
        let mut messages = world.messages.clone();
        let first = round * 100 + 1;
        let request = proto::PublishRequest {
            producer: "payment".into(),
            messages: (first..first + 50).map(a_message).collect(),
        };
        let call = tokio::spawn(async move { messages.publish(request).await });
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        call.abort();
    }
    // Their tasks go on without them. Each moment shows whole lists only, and in the end every
    // message has its deliveries.
    let whole = async {
        loop {
            let counts = world.counts().await;
            assert_eq!(counts.confirmed % 50, 0, "whole lists only");
            let mut subscriptions = counts.subscriptions.iter();
            if subscriptions.all(|counted| counted.pending == counts.confirmed) {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, whole).await.unwrap();
}
