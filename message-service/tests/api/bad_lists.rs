//! Whole calls that are refused, with nothing of them stored.

use handfast_proto::v1 as proto;
use tonic::Code;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_types::StatusExt as _;

use crate::world::*;

/// The field that a whole call was refused for.
#[track_caller]
fn field(status: &tonic::Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let bad = status.get_details_bad_request().unwrap();
    bad.field_violations[0].field.clone()
}

#[tokio::test]
async fn an_empty_list_and_one_of_501_are_refused_whole() {
    let mut world = World::start().await;
    let empty = world.prepare("payment", Vec::new()).await.unwrap_err();
    assert_eq!(field(&empty), "messages");
    let many: Vec<_> = (1..=501).map(a_message).collect();
    let refused = world.prepare("payment", many.clone()).await.unwrap_err();
    assert_eq!(field(&refused), "messages");
    let refused = world.publish("payment", many).await.unwrap_err();
    assert_eq!(field(&refused), "messages");
    let ids: Vec<_> = (1..=501).map(an_id).collect();
    let refused = world.confirm("payment", ids.clone()).await.unwrap_err();
    assert_eq!(field(&refused), "message_ids");
    let refused = world.cancel("payment", ids).await.unwrap_err();
    assert_eq!(field(&refused), "message_ids");
    let answers = (1..=501).map(|id| an_answer(id, 1, proto::AnswerKind::Consumed));
    let refused = world.acknowledge("accounting", answers.collect()).await;
    assert_eq!(field(&refused.unwrap_err()), "answers");
    assert_eq!(world.kept().await, 0);

    let most: Vec<_> = (1..=500).map(a_message).collect();
    let kept = world.publish("payment", most).await.unwrap();
    assert_eq!(kept.len(), 500);
    assert_eq!(world.kept().await, 500);
}

#[tokio::test]
async fn several_items_over_1_mib_are_refused_whole_and_one_is_not() {
    let limits = handfast_service::message::Limits {
        payload_bytes: 1024 * 1024,
    };
    let mut world = World::with(handfast_service::service::Settings {
        limits,
        ..Default::default()
    })
    .await;
    let sized = |id, bytes: usize| proto::NewMessage {
        payload: vec![7; bytes].into(),
        ..a_message(id)
    };
    let halves = vec![sized(1, 600 * 1024), sized(2, 600 * 1024)];
    let refused = world.publish("payment", halves).await.unwrap_err();
    assert_eq!(field(&refused), "messages");
    assert_eq!(world.kept().await, 0);
    let one = world.publish("payment", vec![sized(1, 1024 * 1024)]).await;
    assert_eq!(state(&one.unwrap()[0]), proto::MessageState::Confirmed);
}

#[tokio::test]
async fn a_call_over_the_decoding_limit_is_refused_as_malformed() {
    let mut world = World::start().await;
    let huge = proto::NewMessage {
        payload: vec![7; 2 * 1024 * 1024].into(),
        ..a_message(1)
    };
    let refused = world.publish("payment", vec![huge]).await.unwrap_err();
    assert_eq!(field(&refused), "request");
    assert_eq!(world.kept().await, 0);
}

/// The contract's request with bytes where text belongs.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(bytes = "vec", tag = "1")]
    producer: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    messages: Vec<Message>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Message {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    topic: Vec<u8>,
}

#[tokio::test]
async fn text_that_is_not_utf_8_refuses_the_whole_call_and_stores_nothing() {
    let mut world = World::start().await;
    let message = |id, topic: &[u8]| Message {
        id: an_id(id),
        topic: topic.to_vec(),
    };
    let request = Request {
        producer: b"payment".to_vec(),
        messages: vec![message(1, TOPIC.as_bytes()), message(2, &[0xff, 0xfe])],
    };
    for verb in ["Prepare", "Publish"] {
        let mut raw = tonic::client::Grpc::new(world.channel.clone());
        raw.ready().await.unwrap();
        let path = PathAndQuery::try_from(format!("/handfast.v1.Messages/{verb}")).unwrap();
        let codec = tonic_prost::ProstCodec::<Request, proto::PrepareResponse>::default();
        let refused = raw.unary(tonic::Request::new(request.clone()), path, codec);
        assert_eq!(field(&refused.await.unwrap_err()), "request");
    }
    assert_eq!(world.kept().await, 0);
}
