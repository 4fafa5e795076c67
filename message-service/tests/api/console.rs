//! What operators read.

use handfast_proto::v1 as proto;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::world::*;

#[tokio::test]
async fn counts_name_every_party_even_the_idle_ones() {
    let mut world = World::start().await;
    world.prepare("payment", vec![a_message(1)]).await.unwrap();
    world.publish("orders", vec![a_message(2)]).await.unwrap();
    let counts = world.counts().await;
    assert_eq!((counts.prepared, counts.confirmed), (1, 1));
    let pending: Vec<_> = counts
        .subscriptions
        .iter()
        .map(|counts| (counts.subscription.as_str(), counts.pending, counts.active))
        .collect();
    assert_eq!(pending, [("accounting", 1, true), ("points", 1, true)]);
    let prepared: Vec<_> = counts
        .producers
        .iter()
        .map(|counts| {
            (
                counts.producer.as_str(),
                counts.prepared,
                counts.unreachable,
            )
        })
        .collect();
    assert_eq!(
        prepared,
        [
            ("legacy", 0, false),
            ("orders", 0, false),
            ("payment", 1, false)
        ]
    );
}

#[tokio::test]
async fn a_message_is_shown_with_its_story() {
    let mut world = World::start().await;
    world.prepare("payment", vec![a_message(1)]).await.unwrap();
    world.confirm("payment", vec![an_id(1)]).await.unwrap();
    world.claim("accounting").await;
    let failed = vec![an_answer(1, 1, proto::AnswerKind::Rejected)];
    world.acknowledge("accounting", failed).await.unwrap();
    let request = proto::ShowMessageRequest {
        message_id: an_id(1),
        with_body: false,
    };
    let shown = world
        .console
        .show_message(request)
        .await
        .unwrap()
        .into_inner();
    assert!(shown.payload.is_empty(), "the body was not asked for");
    assert_eq!(shown.deliveries.len(), 2);
    let story: Vec<_> = shown
        .timeline
        .iter()
        .map(|entry| (entry.kind.as_str(), entry.subscription.as_str()))
        .collect();
    let expected = [
        ("prepared", ""),
        ("confirmed", ""),
        ("sent", "accounting"),
        ("rejected", "accounting"),
        ("dead", "accounting"),
    ];
    assert_eq!(story, expected);

    let nobody = proto::ShowMessageRequest {
        message_id: an_id(9),
        with_body: false,
    };
    let status = world.console.show_message(nobody).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let resource = status.get_details_resource_info().unwrap();
    assert_eq!(resource.resource_type, "message");
}

#[tokio::test]
async fn pages_of_messages_and_deliveries_join_without_gap_or_repeat() {
    let mut world = World::start().await;
    let messages = (1..=7).map(a_message).collect();
    world.publish("payment", messages).await.unwrap();

    let (mut ids, mut cursor) = (Vec::new(), Vec::new());
    loop {
        let request = proto::ListMessagesRequest {
            state: proto::MessageState::Confirmed as i32,
            page_size: 3,
            cursor,
            ..Default::default()
        };
        let page = world
            .console
            .list_messages(request)
            .await
            .unwrap()
            .into_inner();
        ids.extend(page.messages.into_iter().map(|row| row.message_id));
        cursor = page.next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!(ids, (1..=7).map(an_id).collect::<Vec<_>>());

    let (mut rows, mut cursor) = (Vec::new(), Vec::new());
    loop {
        let request = proto::ListDeliveriesRequest {
            state: proto::DeliveryState::Pending as i32,
            page_size: 4,
            cursor,
            ..Default::default()
        };
        let page = world
            .console
            .list_deliveries(request)
            .await
            .unwrap()
            .into_inner();
        rows.extend(
            page.deliveries
                .into_iter()
                .map(|row| (row.subscription, row.message_id)),
        );
        cursor = page.next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    let expected: Vec<_> = ["accounting", "points"]
        .into_iter()
        .flat_map(|name| (1..=7).map(move |id| (name.to_owned(), an_id(id))))
        .collect();
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn a_list_that_makes_no_sense_is_malformed() {
    let mut world = World::start().await;
    let prepared = proto::MessageState::Prepared as i32;
    let list = |state, flag: &str, page_size, cursor: &[u8]| proto::ListMessagesRequest {
        state,
        flag: flag.into(),
        page_size,
        cursor: cursor.to_vec(),
    };
    for request in [
        list(0, "", 0, &[]),
        list(prepared, "conflict", 0, &[]),
        list(prepared, "", 501, &[]),
        list(prepared, "", 0, &[1]),
    ] {
        let status = world.console.list_messages(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let unknown = proto::ListDeliveriesRequest {
        state: proto::DeliveryState::Dead as i32,
        subscription: "nobody".into(),
        ..Default::default()
    };
    let status = world.console.list_deliveries(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let resource = status.get_details_resource_info().unwrap();
    assert_eq!(resource.resource_type, "subscription");
}
