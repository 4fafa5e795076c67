//! Repeats, held keys, wrong states, and what became of a message.

use handfast_proto::v1 as proto;
use handfast_proto::v1::MessageState::{Cancelled, Confirmed, Prepared};
use tonic::Code;
use tonic_types::RpcStatusExt as _;

use crate::world::*;

#[tokio::test]
async fn the_same_id_twice_in_a_list_is_a_repeat_or_another_message() {
    let mut world = World::start().await;
    let other = proto::NewMessage {
        payload: b"else".to_vec().into(),
        ..a_message(1)
    };
    let results = world
        .prepare("payment", vec![a_message(1), a_message(1), other])
        .await
        .unwrap();
    assert_eq!(state(&results[0]), Prepared);
    assert_eq!(state(&results[1]), Prepared);
    let (code, status) = refusal(&results[2]);
    assert_eq!(code, Code::AlreadyExists);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("CONTENT_DIFFERS", "handfast")
    );
    assert_eq!(world.kept().await, 1);
}

#[tokio::test]
async fn a_key_has_one_holder_in_a_list_and_across_calls() {
    let mut world = World::start().await;
    let rival = |id| proto::NewMessage {
        key: a_message(1).key,
        ..a_message(id)
    };
    let results = world
        .prepare("payment", vec![a_message(1), rival(2)])
        .await
        .unwrap();
    assert_eq!(state(&results[0]), Prepared);
    let held = |results: &[proto::ItemResult], index: usize, holder_state: &str| {
        let (code, status) = refusal(&results[index]);
        assert_eq!(code, Code::AlreadyExists);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "KEY_HELD");
        assert_eq!(info.metadata["message_id"], message_id(1).to_string());
        assert_eq!(info.metadata["state"], holder_state);
    };
    held(&results, 1, "PREPARED");
    world.confirm("payment", vec![an_id(1)]).await.unwrap();
    held(
        &world.publish("payment", vec![rival(3)]).await.unwrap(),
        0,
        "CONFIRMED",
    );
    // Another producer's key is another key.
    let others = world.prepare("orders", vec![rival(4)]).await.unwrap();
    assert_eq!(state(&others[0]), Prepared);
    assert_eq!(world.kept().await, 2);
}

#[tokio::test]
async fn a_used_id_with_other_content_changes_nothing() {
    let mut world = World::start().await;
    world.prepare("payment", vec![a_message(1)]).await.unwrap();
    let other = proto::NewMessage {
        payload: b"else".to_vec().into(),
        ..a_message(1)
    };
    for results in [
        world.prepare("payment", vec![other.clone()]).await.unwrap(),
        world.publish("payment", vec![other]).await.unwrap(),
    ] {
        let (code, status) = refusal(&results[0]);
        assert_eq!(code, Code::AlreadyExists);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "CONTENT_DIFFERS");
        assert_eq!(info.metadata["message_id"], message_id(1).to_string());
        assert_eq!(info.metadata["state"], "PREPARED");
    }
    let request = proto::ShowMessageRequest {
        message_id: an_id(1),
        with_body: true,
    };
    let shown = world
        .console
        .show_message(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(shown.payload, a_message(1).payload);
}

#[tokio::test]
async fn a_decided_message_refuses_what_contradicts_it_and_repeats_what_agrees() {
    let mut world = World::start().await;
    world
        .prepare("payment", vec![a_message(1), a_message(2)])
        .await
        .unwrap();
    for _repeat in 0..2 {
        let confirmed = world.confirm("payment", vec![an_id(1)]).await.unwrap();
        assert_eq!(state(&confirmed[0]), Confirmed);
        let cancelled = world.cancel("payment", vec![an_id(2)]).await.unwrap();
        assert_eq!(state(&cancelled[0]), Cancelled);
    }
    let wrong = |results: &[proto::ItemResult], index: usize, id: u128, found: &str| {
        let (code, status) = refusal(&results[index]);
        assert_eq!(code, Code::FailedPrecondition);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "WRONG_STATE");
        assert_eq!(info.metadata["message_id"], message_id(id).to_string());
        assert_eq!(info.metadata["state"], found);
    };
    let again = world
        .prepare("payment", vec![a_message(1), a_message(2)])
        .await
        .unwrap();
    wrong(&again, 0, 1, "CONFIRMED");
    wrong(&again, 1, 2, "CANCELLED");
    assert_eq!(
        world.counts().await.conflict,
        0,
        "a late prepare is no contradiction"
    );
    wrong(
        &world.cancel("payment", vec![an_id(1)]).await.unwrap(),
        0,
        1,
        "CONFIRMED",
    );
    wrong(
        &world.confirm("payment", vec![an_id(2)]).await.unwrap(),
        0,
        2,
        "CANCELLED",
    );
    assert_eq!(world.counts().await.conflict, 2);
}

#[tokio::test]
async fn get_tells_the_producer_what_became_of_its_message() {
    let mut world = World::start().await;
    world.prepare("payment", vec![a_message(1)]).await.unwrap();
    world.confirm("payment", vec![an_id(1)]).await.unwrap();
    let Some(proto::get_result::Outcome::Status(status)) = world.get("payment", 1).await.outcome
    else {
        panic!("it is there");
    };
    assert_eq!(status.state(), Confirmed);
    assert_eq!(status.decided_by(), proto::DecidedBy::Producer);
    assert_eq!(status.topic, TOPIC);
    let subscriptions: Vec<_> = status
        .deliveries
        .iter()
        .map(|delivery| (delivery.subscription.as_str(), delivery.state()))
        .collect();
    let pending = proto::DeliveryState::Pending;
    assert_eq!(
        subscriptions,
        [("accounting", pending), ("points", pending)]
    );
}
