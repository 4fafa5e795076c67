//! The verbs one by one, and how they share calls.

use std::sync::Arc;
use std::time::Duration;

use handfast_producer::proto::v1::MessageState;
use handfast_producer::{CallError, ConnectError, Message, Producer};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use crate::scripted::{Fault, Scripted};

async fn connected() -> (Scripted, Producer) {
    let service = Scripted::start().await;
    let producer = Producer::connect(&service.url, "orders").await.unwrap();
    (service, producer)
}

#[tokio::test]
async fn calls_that_wait_for_one_in_flight_go_out_together() {
    let (service, producer) = connected().await;
    let go = Arc::new(Notify::new());
    service.script("publish", [Fault::Wait(go.clone())]);
    let first = {
        let producer = producer.clone();
        tokio::spawn(async move { producer.publish(&Message::new("t")).await })
    };
    service
        .until("the first call", |state| state.calls.len() == 1)
        .await;
    let mut others = JoinSet::new();
    for _ in 0..600 {
        let producer = producer.clone();
        others.spawn(async move { producer.publish(&Message::new("t")).await });
    }
    // On this runtime's one thread they are all queued once they have all run.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    first.await.unwrap().unwrap();
    for published in others.join_all().await {
        published.unwrap();
    }
    let calls = service.calls("publish");
    assert_eq!(calls.iter().sum::<usize>(), 601);
    assert!(calls.len() <= 4, "{calls:?}");
    assert!(calls.iter().all(|items| *items <= 500), "{calls:?}");
}

#[tokio::test]
async fn a_batch_is_cut_at_one_mebibyte() {
    let (service, producer) = connected().await;
    let go = Arc::new(Notify::new());
    service.script("publish", [Fault::Wait(go.clone())]);
    let big = Message::new("t").payload("bytes", vec![0; 400 * 1024]);
    let mut all = JoinSet::new();
    for _ in 0..7 {
        let (producer, big) = (producer.clone(), big.clone());
        all.spawn(async move { producer.publish(&big).await });
    }
    service
        .until("the first call", |state| state.calls.len() == 1)
        .await;
    go.notify_one();
    for published in all.join_all().await {
        published.unwrap();
    }
    let calls = service.calls("publish");
    assert_eq!(calls.iter().sum::<usize>(), 7);
    assert!(calls.iter().all(|items| *items <= 2), "{calls:?}");
}

#[tokio::test]
async fn each_item_gets_its_own_result() {
    let (service, producer) = connected().await;
    let known = Uuid::now_v7();
    producer
        .prepare(known, &Message::new("t"), None)
        .await
        .unwrap();
    let (good, bad) = tokio::join!(producer.confirm(known), producer.confirm(Uuid::now_v7()));
    good.unwrap();
    let CallError::Refused { verb, refusal, .. } = bad.unwrap_err() else {
        panic!("an unknown message is refused");
    };
    assert_eq!((verb, refusal.code), ("confirm", Code::NotFound));
    assert_eq!(service.message_state(known), Some(MessageState::Confirmed));
}

#[tokio::test]
async fn a_refused_call_does_not_refuse_the_neighbours() {
    let (service, producer) = connected().await;
    let go = Arc::new(Notify::new());
    // The first holds the others up; their call is refused as a whole, then one of them alone.
    service.script(
        "publish",
        [
            Fault::Wait(go.clone()),
            Fault::Fail(Code::InvalidArgument),
            Fault::Fail(Code::InvalidArgument),
        ],
    );
    let mut all = JoinSet::new();
    for _ in 0..4 {
        let producer = producer.clone();
        all.spawn(async move { producer.publish(&Message::new("t")).await });
    }
    service
        .until("the first call", |state| state.calls.len() == 1)
        .await;
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    let results = all.join_all().await;
    let refused = results.iter().filter(|result| result.is_err()).count();
    assert!(refused <= 1, "{results:?}");
}

#[tokio::test]
async fn an_unavailable_service_is_tried_again() {
    let (service, producer) = connected().await;
    service.script(
        "publish",
        [
            Fault::Fail(Code::Unavailable),
            Fault::Fail(Code::ResourceExhausted),
        ],
    );
    let id = producer.publish(&Message::new("t")).await.unwrap();
    assert_eq!(service.calls("publish"), [1, 1, 1]);
    let status = producer.get(id).await.unwrap();
    assert_eq!(status.state(), MessageState::Confirmed);
}

#[tokio::test]
async fn a_call_ends_with_its_deadline() {
    let (service, producer) = connected().await;
    service.script("get", [Fault::Wait(Arc::new(Notify::new()))]);
    let failed = producer
        .with_deadline(Duration::from_millis(100))
        .get(Uuid::now_v7())
        .await
        .unwrap_err();
    assert!(
        matches!(failed, CallError::Unavailable { verb: "get", .. }),
        "{failed}"
    );
}

#[tokio::test]
async fn a_bad_address_or_name_is_refused_at_once() {
    let failed = Producer::connect("not an address", "orders").await;
    assert!(
        matches!(failed, Err(ConnectError::Url { .. })),
        "{failed:?}"
    );
    let failed = Producer::connect("http://127.0.0.1:7400", "").await;
    assert!(
        matches!(failed, Err(ConnectError::Name { .. })),
        "{failed:?}"
    );
}
