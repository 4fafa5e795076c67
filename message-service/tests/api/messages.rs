//! Unknown names, malformed items, and topics where a message may not go.

use handfast_proto::v1 as proto;
use handfast_proto::v1::MessageState::{Confirmed, Prepared};
use tonic::Code;
use tonic_types::{RpcStatusExt as _, StatusExt as _};

use crate::world::*;

#[tokio::test]
async fn an_unregistered_producer_is_not_found_by_any_verb() {
    let mut world = World::start().await;
    let refused = [
        world.prepare("nobody", vec![a_message(1)]).await.err(),
        world.publish("nobody", vec![a_message(1)]).await.err(),
        world.confirm("nobody", vec![an_id(1)]).await.err(),
        world.cancel("nobody", vec![an_id(1)]).await.err(),
    ];
    for status in refused {
        let status = status.unwrap();
        assert_eq!(status.code(), Code::NotFound);
        let resource = status.get_details_resource_info().unwrap();
        assert_eq!(resource.resource_type, "producer");
        assert_eq!(resource.resource_name, "nobody");
    }
    let nameless = world.prepare("", vec![a_message(1)]).await.unwrap_err();
    assert_eq!(nameless.code(), Code::InvalidArgument);
    assert_eq!(world.kept().await, 0);
}

#[tokio::test]
async fn what_is_unknown_is_named_item_by_item() {
    let mut world = World::start().await;
    let elsewhere = proto::NewMessage {
        topic: "no.such".into(),
        ..a_message(1)
    };
    let results = world
        .prepare("payment", vec![elsewhere, a_message(2)])
        .await
        .unwrap();
    let (code, status) = refusal(&results[0]);
    assert_eq!(code, Code::NotFound);
    let resource = status.get_details_resource_info().unwrap();
    assert_eq!(
        (
            resource.resource_type.as_str(),
            resource.resource_name.as_str()
        ),
        ("topic", "no.such")
    );
    assert_eq!(state(&results[1]), Prepared);

    let results = world.confirm("payment", vec![an_id(9), an_id(2)]).await;
    let results = results.unwrap();
    let (code, status) = refusal(&results[0]);
    assert_eq!(code, Code::NotFound);
    let resource = status.get_details_resource_info().unwrap();
    assert_eq!(resource.resource_type, "message");
    assert_eq!(resource.resource_name, message_id(9).to_string());
    assert_eq!(state(&results[1]), Confirmed);
}

#[tokio::test]
async fn anothers_message_can_neither_be_seen_nor_decided_nor_replaced() {
    let mut world = World::start().await;
    world.prepare("payment", vec![a_message(1)]).await.unwrap();

    let confirmed = world.confirm("orders", vec![an_id(1)]).await.unwrap();
    assert_eq!(refusal(&confirmed[0]).0, Code::NotFound);
    let cancelled = world.cancel("orders", vec![an_id(1)]).await.unwrap();
    assert_eq!(refusal(&cancelled[0]).0, Code::NotFound);
    match world.get("orders", 1).await.outcome {
        Some(proto::get_result::Outcome::Error(status)) => {
            assert_eq!(Code::from(status.code), Code::NotFound);
        }
        other => panic!("{other:?}"),
    }
    for taken in [
        world.prepare("orders", vec![a_message(1)]).await.unwrap(),
        world.publish("orders", vec![a_message(1)]).await.unwrap(),
    ] {
        let (code, status) = refusal(&taken[0]);
        assert_eq!(code, Code::AlreadyExists);
        assert!(status.details.is_empty(), "nothing is said about it");
    }
    let mine = world.confirm("payment", vec![an_id(1)]).await.unwrap();
    assert_eq!(state(&mine[0]), Confirmed);
}

#[tokio::test]
async fn malformed_items_are_refused_one_by_one_and_the_others_go_through() {
    let mut world = World::start().await;
    let header = |name: &str, value: String| proto::Header {
        name: name.into(),
        value,
    };
    let base = a_message(1);
    let cases = vec![
        (
            "id",
            proto::NewMessage {
                id: vec![0; 16],
                ..base.clone()
            },
        ),
        (
            "id",
            proto::NewMessage {
                id: vec![1; 15],
                ..base.clone()
            },
        ),
        (
            "topic",
            proto::NewMessage {
                topic: String::new(),
                ..base.clone()
            },
        ),
        (
            "topic",
            proto::NewMessage {
                topic: "a\0b".into(),
                ..base.clone()
            },
        ),
        (
            "topic",
            proto::NewMessage {
                topic: "t".repeat(101),
                ..base.clone()
            },
        ),
        (
            "key",
            proto::NewMessage {
                key: Some(String::new()),
                ..base.clone()
            },
        ),
        (
            "key",
            proto::NewMessage {
                key: Some("k".repeat(256)),
                ..base.clone()
            },
        ),
        (
            "fence",
            proto::NewMessage {
                fence: vec![1; 3],
                ..base.clone()
            },
        ),
        (
            "payload",
            proto::NewMessage {
                payload: vec![0; 256 * 1024 + 1].into(),
                ..base.clone()
            },
        ),
        (
            "headers",
            proto::NewMessage {
                headers: (0..65)
                    .map(|n| header(&n.to_string(), String::new()))
                    .collect(),
                ..base.clone()
            },
        ),
        (
            "headers[0].value",
            proto::NewMessage {
                headers: vec![header("h", "v".repeat(4097))],
                ..base.clone()
            },
        ),
        (
            "headers",
            proto::NewMessage {
                headers: (0..9)
                    .map(|n| header(&n.to_string(), "v".repeat(4096)))
                    .collect(),
                ..base.clone()
            },
        ),
        (
            "headers[1].name",
            proto::NewMessage {
                headers: vec![
                    header("fine", String::new()),
                    header("x-death", String::new()),
                ],
                ..base.clone()
            },
        ),
        (
            "deliver_after",
            proto::NewMessage {
                deliver_after: Some(i64::MAX),
                ..base.clone()
            },
        ),
    ];
    let (fields, mut messages): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    messages.push(a_message(2));
    messages.insert(
        0,
        proto::NewMessage {
            deliver_after: Some(-1),
            ..a_message(3)
        },
    );

    let sent: Vec<_> = messages.iter().map(|message| message.id.clone()).collect();
    let results = world.publish("payment", messages).await.unwrap();
    let answered: Vec<_> = results.iter().map(|item| item.message_id.clone()).collect();
    assert_eq!(answered, sent, "every result stands where its item stood");
    assert_eq!(state(&results[0]), Confirmed, "a past time means at once");
    assert_eq!(state(&results[results.len() - 1]), Confirmed);
    for (field, result) in fields.iter().zip(&results[1..]) {
        let (code, status) = refusal(result);
        assert_eq!(code, Code::InvalidArgument, "{field}");
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, *field);
        assert!(!violations[0].description.is_empty());
    }
    let payload = refusal(&results[9]).1.get_details_bad_request().unwrap();
    let text = &payload.field_violations[0].description;
    assert!(text.contains("262145") && text.contains("262144"), "{text}");
    assert_eq!(world.kept().await, 2);
}

#[tokio::test]
async fn where_a_message_may_not_go_is_said_before_it_is_kept() {
    let mut world = World::start().await;
    let to = |topic: &str, id| proto::NewMessage {
        topic: topic.into(),
        ..a_message(id)
    };
    let list = vec![to(LONELY, 1), to(RESTRICTED, 2), to(OPEN, 3)];
    for results in [
        world.prepare("payment", list.clone()).await.unwrap(),
        world.publish("payment", list).await.unwrap(),
    ] {
        let reason = |index: usize| {
            let (code, status) = refusal(&results[index]);
            (code, status.get_details_error_info().unwrap().reason)
        };
        assert_eq!(
            reason(0),
            (Code::FailedPrecondition, "NO_SUBSCRIBER".into())
        );
        assert_eq!(
            reason(1),
            (Code::PermissionDenied, "TOPIC_NOT_ALLOWED".into())
        );
        state(&results[2]);
    }
    let prepared = world.prepare("legacy", vec![a_message(4)]).await.unwrap();
    let (code, status) = refusal(&prepared[0]);
    assert_eq!(code, Code::FailedPrecondition);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "NO_STATUS_ENDPOINT");
    let published = world.publish("legacy", vec![a_message(4)]).await.unwrap();
    assert_eq!(state(&published[0]), Confirmed);
}
