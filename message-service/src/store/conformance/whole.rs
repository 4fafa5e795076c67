//! What holds for the store as a whole: retention, concurrency, lists, counts.

use super::*;

pub(crate) async fn what_was_finished_long_ago_is_removed_and_the_rest_is_carried_on(
    harness: &impl Harness,
) {
    let (day, keep) = (Duration::from_secs(86_400), Duration::from_secs(7 * 86_400));
    let store = ready(harness).await;
    // 1 cancelled, 2 consumed by both, 3 prepared, 4 pending, 5 dead, 6 in conflict,
    // 7 consumed only just before retention looks.
    prepare(&*store, vec![message(1), message(3), message(6)]).await;
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    decide(&*store, 6, MessageEvent::Cancel).await.unwrap();
    decide(&*store, 6, MessageEvent::Confirm).await.unwrap_err();
    published(&*store, [2, 4, 5, 7]).await;
    let consumed = |n| Answer {
        id: id(n),
        generation: 0,
        sent_at: None,
        kind: AnswerKind::Consumed,
    };
    for subscription in ["accounting", "points"] {
        store
            .acknowledge(subscription, vec![consumed(2)])
            .await
            .unwrap();
        for claim in claim(&*store, subscription, 10).await {
            if claim.id == id(5) {
                let kind = AnswerKind::Rejected("bad".into());
                let answer = Answer {
                    id: id(5),
                    generation: 1,
                    sent_at: None,
                    kind,
                };
                store.acknowledge(subscription, vec![answer]).await.unwrap();
            }
        }
    }
    for _ in 0..8 {
        store.open_buckets(day).await.unwrap();
        harness.pass(day).await;
    }
    store.open_buckets(day).await.unwrap();
    store
        .acknowledge("accounting", vec![consumed(7)])
        .await
        .unwrap();
    store
        .acknowledge("points", vec![consumed(7)])
        .await
        .unwrap();
    let mut total = Retired::default();
    loop {
        let slice = store.retire(store.now().before(keep)).await.unwrap();
        total.messages += slice.messages;
        total.moved += slice.moved;
        total.buckets += slice.buckets;
        if !slice.more {
            break;
        }
    }
    assert_eq!((total.messages, total.moved), (2, 5));
    assert!(total.buckets >= 1);
    for n in 1..=7 {
        let found = store.show(id(n), true).await.unwrap();
        assert_eq!(found.is_none(), n <= 2, "message {n}");
        if let Some(shown) = found {
            assert_eq!(shown.body.expect("its body").1, message(n).payload);
        }
    }
    assert_eq!(
        claim(&*store, "points", 10).await.len(),
        1,
        "what was carried is still sent"
    );
}

pub(crate) async fn a_shorter_span_of_buckets_matters_at_once(harness: &impl Harness) {
    let minute = Duration::from_secs(60);
    let store = ready(harness).await;
    // The buckets of a new store are planned a day ahead.
    prepare(&*store, vec![message(1)]).await;
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    store.open_buckets(minute).await.unwrap();
    harness.pass(2 * minute).await;
    store.open_buckets(minute).await.unwrap();
    harness.pass(2 * minute).await;
    let retired = store.retire(store.now().before(minute)).await.unwrap();
    assert_eq!(retired.messages, 1);
    assert!(store.show(id(1), false).await.unwrap().is_none());
}

pub(crate) async fn a_row_in_an_unknown_state_is_left_alone_and_counted(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1, 2]).await;
    harness.write_unknown_state("delivery", id(1)).await;
    harness.write_unknown_state("message", id(2)).await;
    let claims = claim(&*store, "accounting", 10).await;
    assert!(claims.iter().all(|claim| claim.id != id(1)));
    assert_eq!(
        answer(&*store, 1, 0, AnswerKind::Consumed).await,
        AnswerOutcome::Stale
    );
    assert_eq!(
        store.counts().await.unwrap().unknown,
        3,
        "two deliveries and a message"
    );
    assert_eq!(store.expire("accounting", 10).await.unwrap(), 0);
}

pub(crate) async fn concurrent_decisions_of_one_message_agree_on_one(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..16 {
        let store = store.clone();
        let event = if n % 2 == 0 {
            MessageEvent::Confirm
        } else {
            MessageEvent::Cancel
        };
        calls.spawn(async move { (event, decide(&*store, 1, event).await) });
    }
    let state = {
        let mut states = BTreeSet::new();
        while let Some(call) = calls.join_next().await {
            if let (_, Ok(state)) = call.unwrap() {
                states.insert(state);
            }
        }
        assert_eq!(states.len(), 1);
        states.pop_first()
    };
    assert_eq!(Some(shown(&*store, 1).await.message.state), state);
}

pub(crate) async fn concurrent_claims_never_share_a_delivery(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, 1..=200).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let store = store.clone();
        calls.spawn(async move { claim(&*store, "accounting", 13).await });
    }
    let mut seen = BTreeSet::new();
    while let Some(claims) = calls.join_next().await {
        for claim in claims.unwrap() {
            assert!(seen.insert(claim.id), "{} was claimed twice", claim.id);
        }
    }
    assert_eq!(seen.len(), 200);
}

pub(crate) async fn a_dropped_call_is_done_as_a_whole_or_not_at_all(harness: &impl Harness) {
    let store = ready(harness).await;
    for round in 0..50_u128 {
        let numbers = (round * 10 + 1)..=(round * 10 + 10);
        let call = store.publish(numbers.clone().map(message).collect(), Handoff::none());
        // Polled a few times and dropped, as a client that goes away drops its call.
        let mut call = std::pin::pin!(call);
        for _ in 0..round % 4 {
            tokio::select! {
                biased;
                _ = &mut call => break,
                () = tokio::task::yield_now() => {}
            }
        }
    }
    // A later write waits its turn, so everything before it is done or was never begun.
    published(&*store, [100_000]).await;
    for round in 0..50_u128 {
        let ids = ((round * 10 + 1)..=(round * 10 + 10)).map(id).collect();
        let found = store.get("payment", ids).await.unwrap();
        let there = found.iter().flatten().count();
        assert!(there == 0 || there == 10, "round {round}: {there} of 10");
        assert!(
            found
                .iter()
                .flatten()
                .all(|(_, deliveries)| deliveries.len() == 2)
        );
    }
}

pub(crate) async fn lists_page_through_everything_once(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, 1..=25).await;
    prepare(&*store, vec![message(100)]).await;
    let mut listed = Vec::new();
    loop {
        let filter = MessageFilter::State(MessageState::Confirmed);
        let page = store
            .list_messages(filter, listed.last().copied(), 10)
            .await
            .unwrap();
        listed.extend(page.iter().map(|view| view.id));
        if page.len() < 10 {
            break;
        }
    }
    assert_eq!(listed, (1..=25).map(id).collect::<Vec<_>>());
    let mut cursor = None;
    let mut deliveries = Vec::new();
    loop {
        let page = store
            .list_deliveries(DeliveryState::Pending, None, cursor, 10)
            .await
            .unwrap();
        deliveries.extend(page.iter().map(|view| (view.subscription.clone(), view.id)));
        cursor = deliveries.last().cloned();
        if page.len() < 10 {
            break;
        }
    }
    assert_eq!(deliveries.len(), 50);
    assert!(deliveries.is_sorted());
    let only = store
        .list_deliveries(DeliveryState::Pending, Some("points"), None, 100)
        .await
        .unwrap();
    assert_eq!(only.len(), 25);
    let conflicts = store
        .list_messages(MessageFilter::Conflict, None, 10)
        .await
        .unwrap();
    assert!(conflicts.is_empty());
    decide(&*store, 3, MessageEvent::Cancel).await.unwrap_err();
    let conflicts = store
        .list_messages(MessageFilter::Conflict, None, 10)
        .await
        .unwrap();
    assert_eq!(
        conflicts.iter().map(|view| view.id).collect::<Vec<_>>(),
        [id(3)]
    );
}

pub(crate) async fn counts_add_up(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, (1..=3).map(message).collect()).await;
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    published(&*store, 4..=8).await;
    store
        .publish(
            vec![NewMessage {
                topic: "audit".into(),
                ..message(9)
            }],
            Handoff::none(),
        )
        .await
        .unwrap();
    send(&*store, 4).await;
    answer(&*store, 5, 0, AnswerKind::Consumed).await;
    let counts = store.counts().await.unwrap();
    assert_eq!(
        (counts.prepared, counts.confirmed, counts.cancelled),
        (2, 6, 1)
    );
    assert_eq!((counts.unsubscribed, counts.unknown), (1, 0));
    assert_eq!(counts.producers, [("payment".to_owned(), 2)]);
    let accounting = &counts.subscriptions[0];
    assert_eq!(
        (accounting.pending, accounting.sent, accounting.dead),
        (3, 1, 0)
    );
    assert!(accounting.active && accounting.oldest_open_at.is_some());
    assert_eq!(counts.subscriptions[1].pending, 5);
}

pub(crate) async fn the_backlog_is_what_is_unfinished(harness: &impl Harness) {
    let store = ready(harness).await;
    assert_eq!(store.backlog_bytes().await.unwrap(), 0);
    let large = |n| NewMessage {
        payload: vec![b'x'; 9_000],
        ..message(n)
    };
    prepare(&*store, (1..=2).map(large).collect()).await;
    store
        .publish((3..=5).map(large).collect(), Handoff::none())
        .await
        .unwrap();
    // Each once, though two subscriptions have three of them.
    let about_10_000_each = 5 * 9_000..5 * 11_000;
    let backlog = store.backlog_bytes().await.unwrap();
    assert!(about_10_000_each.contains(&backlog), "{backlog}");
    for n in 1..=2 {
        decide(&*store, n, MessageEvent::Cancel).await.unwrap();
    }
    let consumed = |n| Answer {
        id: id(n),
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    };
    let done: Vec<_> = (3..=5).map(consumed).collect();
    store.acknowledge("accounting", done.clone()).await.unwrap();
    let backlog = store.backlog_bytes().await.unwrap();
    assert!((3 * 9_000..3 * 11_000).contains(&backlog), "{backlog}");
    store.acknowledge("points", done).await.unwrap();
    assert_eq!(store.backlog_bytes().await.unwrap(), 0);
}

/// Random calls on a few messages against a small model of the message's life.
pub(crate) async fn random_calls_keep_to_the_model(harness: &impl Harness) {
    use rand::{Rng as _, SeedableRng as _};

    let store = ready(harness).await;
    let mut rng = rand::rngs::StdRng::seed_from_u64(20_261_123);
    let mut model: BTreeMap<u128, MessageState> = BTreeMap::new();
    for step in 0..500 {
        // A list may name a message more than once.
        let numbers: Vec<u128> = (0..rng.random_range(1..=5))
            .map(|_| rng.random_range(1..=40))
            .collect();
        let events: Vec<_> = match rng.random_range(0..4) {
            0 => vec![MessageEvent::Prepare; numbers.len()],
            1 => vec![MessageEvent::Publish; numbers.len()],
            _ => numbers
                .iter()
                .map(|_| match rng.random_bool(0.5) {
                    true => MessageEvent::Confirm,
                    false => MessageEvent::Cancel,
                })
                .collect(),
        };
        let messages = numbers.iter().copied().map(message).collect();
        let items = match events[0] {
            MessageEvent::Prepare => prepare(&*store, messages).await,
            MessageEvent::Publish => {
                let written = store.publish(messages, Handoff::none()).await;
                written.unwrap().items
            }
            MessageEvent::Confirm | MessageEvent::Cancel => {
                let decisions = numbers.iter().zip(&events);
                let decisions = decisions.map(|(n, event)| Decision {
                    id: id(*n),
                    event: *event,
                });
                let decisions = decisions.collect();
                let written = store.decide("payment", decisions, Handoff::none()).await;
                written.unwrap().items
            }
        };
        assert_eq!(items.len(), numbers.len());
        for ((item, n), event) in items.into_iter().zip(numbers).zip(events) {
            let known = model.get(&n).copied();
            let wanted = match (known, event) {
                (None, MessageEvent::Prepare) => Ok(MessageState::Prepared),
                (None, MessageEvent::Publish) => Ok(MessageState::Confirmed),
                (None, _) => Err(Refusal::NoSuchMessage(id(n))),
                (Some(state), _) => match state.apply(event) {
                    Ok(Effect::Moves(next)) => Ok(next),
                    Ok(Effect::AlreadySo) => Ok(state),
                    Err(wrong) => Err(Refusal::WrongState { id: id(n), wrong }),
                },
            };
            assert_eq!(
                item, wanted,
                "step {step}: {event} of {n}, which is {known:?}"
            );
            if let Ok(state) = item {
                model.insert(n, state);
            }
        }
    }
    for (n, state) in model {
        let shown = shown(&*store, n).await;
        assert_eq!(shown.message.state, state);
        let deliveries = if state == MessageState::Confirmed {
            2
        } else {
            0
        };
        assert_eq!(shown.deliveries.len(), deliveries);
    }
}
