//! The stream `Consume`.

use handfast_proto::v1 as proto;
use handfast_proto::v1::consume_request::{Kind, Open};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::world::*;

type Requests = mpsc::Sender<proto::ConsumeRequest>;

fn open(topic: &str, subscription: &str) -> Kind {
    Kind::Open(Open {
        topic: topic.into(),
        subscription: subscription.into(),
        consumer: "a test".into(),
    })
}

impl World {
    async fn consume(
        &self,
        first: Vec<Kind>,
    ) -> Result<(Requests, Streaming<proto::ConsumeResponse>), Status> {
        let (requests, stream) = mpsc::channel(16);
        for kind in first {
            let request = proto::ConsumeRequest { kind: Some(kind) };
            requests.send(request).await.unwrap();
        }
        let stream = ReceiverStream::new(stream);
        let response = self.deliveries.clone().consume(stream).await?;
        Ok((requests, response.into_inner()))
    }
}

/// The ids of the next response.
async fn next(stream: &mut Streaming<proto::ConsumeResponse>) -> Vec<proto::Delivery> {
    let response = tokio::time::timeout(DEADLINE, stream.message()).await;
    response.unwrap().unwrap().unwrap().deliveries
}

#[tokio::test]
async fn a_stream_opens_first_and_only_what_exists() {
    let world = World::start().await;
    let cases = [
        (vec![Kind::Credit(1)], Code::InvalidArgument),
        (vec![open("no.such", "accounting")], Code::NotFound),
        (vec![open(TOPIC, "nobody")], Code::NotFound),
        (vec![open(LONELY, "accounting")], Code::NotFound),
        (vec![open("", "accounting")], Code::InvalidArgument),
    ];
    for (first, code) in cases {
        let status = world.consume(first.clone()).await.unwrap_err();
        assert_eq!(status.code(), code, "{first:?}");
    }
    let unknown = world
        .consume(vec![open(TOPIC, "nobody")])
        .await
        .unwrap_err();
    let resource = unknown.get_details_resource_info().unwrap();
    assert_eq!(resource.resource_type, "subscription");
    assert_eq!(resource.resource_name, "nobody");
}

#[tokio::test]
async fn a_grant_of_nothing_and_a_second_open_end_the_stream() {
    let world = World::start().await;
    for wrong in [Kind::Credit(0), open(TOPIC, "accounting")] {
        let first = vec![open(TOPIC, "accounting"), wrong];
        let (_requests, mut stream) = world.consume(first).await.unwrap();
        let ended = tokio::time::timeout(DEADLINE, stream.message()).await;
        assert_eq!(ended.unwrap().unwrap_err().code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn credit_is_what_a_consumer_gets_and_answers_are_recorded() {
    let mut world = World::start().await;
    let messages = (1..=5).map(a_message).collect();
    world.publish("payment", messages).await.unwrap();
    let first = vec![open(TOPIC, "accounting"), Kind::Credit(3)];
    let (requests, mut stream) = world.consume(first).await.unwrap();
    let mut got = Vec::new();
    while got.len() < 3 {
        got.extend(next(&mut stream).await);
    }
    assert_eq!(got.len(), 3, "three were granted");
    let first = &got[0];
    assert_eq!(first.subscription, "accounting");
    assert_eq!(first.producer, "payment");
    assert_eq!(first.topic, TOPIC);
    assert_eq!(first.generation, 1);
    assert!(!first.alone);
    assert!(first.payload.starts_with(b"{\"order\":"));

    let credit = proto::ConsumeRequest {
        kind: Some(Kind::Credit(2)),
    };
    requests.send(credit).await.unwrap();
    while got.len() < 5 {
        got.extend(next(&mut stream).await);
    }
    let answers: Vec<_> = got
        .iter()
        .map(|delivery| proto::Answer {
            message_id: delivery.message_id.clone(),
            generation: delivery.generation,
            sent_at: delivery.sent_at,
            kind: proto::AnswerKind::Consumed as i32,
            ..proto::Answer::default()
        })
        .collect();
    let results = world.acknowledge("accounting", answers).await.unwrap();
    for result in &results {
        assert_eq!(result.outcome(), proto::AnswerOutcome::Recorded);
    }
    // A half-closed stream ends once everything on it is answered.
    drop(requests);
    let end = tokio::time::timeout(DEADLINE, stream.message()).await;
    assert!(end.unwrap().unwrap().is_none());
}

#[tokio::test]
async fn what_a_vanished_stream_held_goes_to_the_next_one_alone() {
    let mut world = World::start().await;
    world.publish("payment", vec![a_message(1)]).await.unwrap();
    let first = || vec![open(TOPIC, "accounting"), Kind::Credit(10)];
    let (requests, mut stream) = world.consume(first()).await.unwrap();
    assert_eq!(next(&mut stream).await[0].generation, 1);
    drop((requests, stream));

    let (_requests, mut stream) = world.consume(first()).await.unwrap();
    let again = next(&mut stream).await;
    assert_eq!(again[0].message_id, an_id(1));
    assert_eq!(again[0].generation, 2);
    assert!(again[0].alone);
}

#[tokio::test]
async fn open_streams_are_counted_as_consumers() {
    let mut world = World::start().await;
    let (_requests, _stream) = world.consume(vec![open(TOPIC, "points")]).await.unwrap();
    let counts = world.counts().await;
    let consumers: Vec<_> = counts
        .subscriptions
        .iter()
        .map(|counts| (counts.subscription.as_str(), counts.consumers))
        .collect();
    assert_eq!(consumers, [("accounting", 0), ("points", 1)]);
}
