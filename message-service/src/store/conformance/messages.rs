//! Prepare, publish, confirm, cancel.

use super::*;

pub(crate) async fn a_prepared_message_is_kept_and_delivered_to_nobody(harness: &impl Harness) {
    let store = ready(harness).await;
    assert_eq!(
        prepare(&*store, vec![message(1)]).await,
        [Ok(MessageState::Prepared)]
    );
    let shown = shown(&*store, 1).await;
    assert_eq!(shown.message.state, MessageState::Prepared);
    assert_eq!(shown.message.decided_by, None);
    assert!(shown.deliveries.is_empty());
    assert!(claim(&*store, "accounting", 10).await.is_empty());
}

pub(crate) async fn a_repeated_prepare_answers_as_the_first_time(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![keyed(1, "k")]).await;
    let mut again = keyed(1, "k");
    again
        .headers
        .insert(0, ("traceparent".into(), "other".into()));
    assert_eq!(
        prepare(&*store, vec![again]).await,
        [Ok(MessageState::Prepared)]
    );
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    let wrong = WrongState {
        event: MessageEvent::Prepare,
        state: MessageState::Confirmed,
    };
    assert_eq!(
        prepare(&*store, vec![keyed(1, "k")]).await,
        [Err(Refusal::WrongState { id: id(1), wrong })]
    );
}

pub(crate) async fn the_same_id_with_other_content_is_refused_and_nothing_changes(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let before = store.show(id(1), true).await.unwrap();
    let other = NewMessage {
        payload: b"other".to_vec(),
        ..message(1)
    };
    let refused = Err(Refusal::OtherContent {
        id: id(1),
        state: MessageState::Prepared,
    });
    assert_eq!(
        prepare(&*store, vec![other.clone()]).await,
        std::slice::from_ref(&refused)
    );
    assert_eq!(
        store
            .publish(vec![other], Handoff::none())
            .await
            .unwrap()
            .items,
        [refused]
    );
    assert_eq!(store.show(id(1), true).await.unwrap(), before);
}

pub(crate) async fn another_producers_id_is_refused_without_its_state(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let theirs = NewMessage {
        producer: "shop".into(),
        ..message(1)
    };
    let taken = [Err(Refusal::IdTaken(id(1)))];
    assert_eq!(prepare(&*store, vec![theirs.clone()]).await, taken);
    assert_eq!(
        store
            .publish(vec![theirs], Handoff::none())
            .await
            .unwrap()
            .items,
        taken
    );
}

pub(crate) async fn the_same_id_twice_in_one_list_is_a_repeat(harness: &impl Harness) {
    let store = ready(harness).await;
    let other = NewMessage {
        payload: b"other".to_vec(),
        ..message(1)
    };
    let items = prepare(&*store, vec![message(1), message(1), other, message(2)]).await;
    assert_eq!(
        items,
        [
            Ok(MessageState::Prepared),
            Ok(MessageState::Prepared),
            Err(Refusal::OtherContent {
                id: id(1),
                state: MessageState::Prepared
            }),
            Ok(MessageState::Prepared),
        ]
    );
}

pub(crate) async fn the_first_of_two_with_one_key_in_one_list_is_the_holder(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    let items = prepare(&*store, vec![keyed(1, "k"), keyed(2, "k")]).await;
    let held = Refusal::KeyHeld {
        holder: id(1),
        state: MessageState::Prepared,
    };
    assert_eq!(items, [Ok(MessageState::Prepared), Err(held)]);
    assert_eq!(store.show(id(2), false).await.unwrap(), None);
}

pub(crate) async fn a_held_key_names_its_holder_and_has_it_checked_at_once(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![keyed(1, "k")]).await;
    assert!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    let held = |state| {
        [Err(Refusal::KeyHeld {
            holder: id(1),
            state,
        })]
    };
    assert_eq!(
        prepare(&*store, vec![keyed(2, "k")]).await,
        held(MessageState::Prepared)
    );
    let claims = store.claim_checks("payment", 10, LEASE).await.unwrap();
    assert_eq!(
        claims.iter().map(|claim| claim.id).collect::<Vec<_>>(),
        [id(1)]
    );
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    assert_eq!(
        prepare(&*store, vec![keyed(2, "k")]).await,
        held(MessageState::Confirmed)
    );
    assert_eq!(
        store
            .publish(vec![keyed(3, "k")], Handoff::none())
            .await
            .unwrap()
            .items,
        held(MessageState::Confirmed)
    );
}

pub(crate) async fn a_cancelled_message_releases_its_key(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![keyed(1, "k")]).await;
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    assert_eq!(
        prepare(&*store, vec![keyed(2, "k")]).await,
        [Ok(MessageState::Prepared)]
    );
}

pub(crate) async fn a_key_is_held_per_producer_and_topic(harness: &impl Harness) {
    let store = ready(harness).await;
    let elsewhere = NewMessage {
        topic: "audit".into(),
        ..keyed(2, "k")
    };
    let theirs = NewMessage {
        producer: "shop".into(),
        ..keyed(3, "k")
    };
    let items = prepare(&*store, vec![keyed(1, "k"), elsewhere, theirs]).await;
    assert_eq!(items, [const { Ok(MessageState::Prepared) }; 3]);
}

pub(crate) async fn confirming_creates_one_delivery_per_active_subscription(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    let alone = NewMessage {
        topic: "audit".into(),
        ..message(2)
    };
    prepare(&*store, vec![message(1), alone]).await;
    let decisions = [1, 2].map(|n| Decision {
        id: id(n),
        event: MessageEvent::Confirm,
    });
    let written = store
        .decide("payment", decisions.to_vec(), Handoff::none())
        .await
        .unwrap();
    assert_eq!(
        written.items,
        [Ok(MessageState::Confirmed), Ok(MessageState::Confirmed)]
    );
    assert!(written.topics.contains(TOPIC));
    let names: Vec<_> = shown(&*store, 1)
        .await
        .deliveries
        .into_iter()
        .map(|d| (d.subscription, d.state))
        .collect();
    let pending = DeliveryState::Pending;
    assert_eq!(
        names,
        [
            ("accounting".to_owned(), pending),
            ("points".to_owned(), pending)
        ]
    );
    let unsubscribed = shown(&*store, 2).await;
    assert!(unsubscribed.message.unsubscribed && unsubscribed.deliveries.is_empty());
    assert!(!shown(&*store, 1).await.message.unsubscribed);
}

pub(crate) async fn a_repeated_confirm_creates_nothing(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let twice = vec![
        Decision {
            id: id(1),
            event: MessageEvent::Confirm
        };
        2
    ];
    let items = store
        .decide("payment", twice, Handoff::none())
        .await
        .unwrap()
        .items;
    assert_eq!(
        items,
        [Ok(MessageState::Confirmed), Ok(MessageState::Confirmed)]
    );
    assert_eq!(
        decide(&*store, 1, MessageEvent::Confirm).await,
        Ok(MessageState::Confirmed)
    );
    assert_eq!(shown(&*store, 1).await.deliveries.len(), 2);
    assert!(!shown(&*store, 1).await.message.conflict);
}

pub(crate) async fn a_confirm_after_a_cancel_is_a_conflict_and_the_reverse_too(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1), message(2)]).await;
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    decide(&*store, 2, MessageEvent::Confirm).await.unwrap();
    for (n, event, state) in [
        (1, MessageEvent::Confirm, MessageState::Cancelled),
        (2, MessageEvent::Cancel, MessageState::Confirmed),
    ] {
        let wrong = WrongState { event, state };
        assert_eq!(
            decide(&*store, n, event).await,
            Err(Refusal::WrongState { id: id(n), wrong })
        );
        let shown = shown(&*store, n).await;
        assert!(shown.message.conflict);
        assert_eq!(shown.message.state, state);
    }
}

pub(crate) async fn another_producers_message_cannot_be_decided(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    for event in [MessageEvent::Confirm, MessageEvent::Cancel] {
        let theirs = vec![Decision { id: id(1), event }];
        let items = store
            .decide("shop", theirs, Handoff::none())
            .await
            .unwrap()
            .items;
        assert_eq!(items, [Err(Refusal::NoSuchMessage(id(1)))]);
    }
    assert_eq!(store.get("shop", vec![id(1)]).await.unwrap(), [None]);
    assert_eq!(
        shown(&*store, 1).await.message.state,
        MessageState::Prepared
    );
}

pub(crate) async fn publishing_is_preparing_and_confirming_in_one_write(harness: &impl Harness) {
    let store = ready(harness).await;
    let written = store
        .publish(vec![message(1), message(1)], Handoff::none())
        .await
        .unwrap();
    assert_eq!(
        written.items,
        [Ok(MessageState::Confirmed), Ok(MessageState::Confirmed)]
    );
    let shown = shown(&*store, 1).await;
    assert_eq!(shown.message.decided_by, Some(DecidedBy::Producer));
    assert_eq!(shown.deliveries.len(), 2);
}

pub(crate) async fn publishing_what_was_prepared_confirms_it(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    published(&*store, [1]).await;
    assert_eq!(shown(&*store, 1).await.deliveries.len(), 2);
    prepare(&*store, vec![message(2)]).await;
    decide(&*store, 2, MessageEvent::Cancel).await.unwrap();
    let items = store
        .publish(vec![message(2)], Handoff::none())
        .await
        .unwrap()
        .items;
    assert!(
        matches!(items[..], [Err(Refusal::WrongState { .. })]),
        "{items:?}"
    );
}
