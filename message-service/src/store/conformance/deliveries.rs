//! Claims, leases, SENT, returns and what is overdue.

use super::*;

pub(crate) async fn a_body_comes_back_as_it_was_handed_over(harness: &impl Harness) {
    let store = ready(harness).await;
    let large = NewMessage {
        payload: (0..=255).cycle().take(70_000).collect(),
        headers: vec![("b".into(), "ü\n".into()), ("a".into(), String::new())],
        key: Some("ключ".into()),
        ..message(1)
    };
    let empty = NewMessage {
        payload: Vec::new(),
        headers: Vec::new(),
        content_type: String::new(),
        ..message(2)
    };
    let quoted = NewMessage {
        payload: vec![0, 0, 7],
        headers: vec![("q".into(), r#"["\u0041", 1e3]"#.into())],
        content_type: r#"a/b; c="\d""#.into(),
        key: Some("007".into()),
        ..message(3)
    };
    let originals = vec![large, empty, quoted];
    store
        .publish(originals.clone(), Handoff::none())
        .await
        .unwrap();
    let claims = claim(&*store, "points", 10).await;
    assert_eq!(claims.len(), originals.len());
    for original in originals {
        let claim = claims.iter().find(|claim| claim.id == original.id);
        let claim = claim.expect("every message is claimed").clone();
        assert_eq!(claim.payload, original.payload);
        assert_eq!(claim.headers, original.headers);
        assert_eq!(claim.key, original.key);
        assert_eq!(claim.content_type, original.content_type);
        assert_eq!(
            (claim.producer, claim.topic),
            (original.producer, original.topic)
        );
    }
}

pub(crate) async fn a_claim_reads_each_body_from_its_bucket(harness: &impl Harness) {
    let store = ready(harness).await;
    let span = 60 * SECOND;
    store.open_buckets(span).await.unwrap();
    let due = |seconds| Some(store.now().after(seconds * SECOND));
    let last = NewMessage {
        deliver_after: due(400),
        ..message(3)
    };
    store
        .publish(vec![last, message(1)], Handoff::none())
        .await
        .unwrap();
    // Long enough for a bucket that was planned with the longest span.
    for _ in 0..3 {
        harness.pass(2 * span).await;
        store.open_buckets(span).await.unwrap();
    }
    published(&*store, [2]).await;
    harness.pass(60 * SECOND).await;
    let claims = claim(&*store, "points", 10).await;
    let bodies = claims.into_iter().map(|claim| (claim.id, claim.payload));
    let wanted = [1, 2, 3].map(|n| (id(n), message(n).payload));
    assert_eq!(bodies.collect::<Vec<_>>(), wanted);
    let all_but_one = 2 * message(1).body_bytes() + 1;
    let lane = Lane::Normal {
        limit: 10,
        max_bytes: all_but_one,
    };
    let claimed = store.claim_deliveries("accounting", lane, LEASE).await;
    assert!((1..=2).contains(&claimed.unwrap().deliveries.len()));
}

pub(crate) async fn a_delivery_waits_for_its_time(harness: &impl Harness) {
    let store = ready(harness).await;
    let later = store.now().after(60 * SECOND);
    let past = Some(store.now().before(60 * SECOND));
    let delayed = NewMessage {
        deliver_after: Some(later),
        ..message(1)
    };
    let overdue = NewMessage {
        deliver_after: past,
        ..message(2)
    };
    prepare(&*store, vec![delayed, overdue]).await;
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    decide(&*store, 2, MessageEvent::Confirm).await.unwrap();
    assert_eq!(claim(&*store, "accounting", 10).await[0].id, id(2));
    let lane = Lane::Normal {
        limit: 10,
        max_bytes: 1,
    };
    let claimed = store
        .claim_deliveries("accounting", lane, LEASE)
        .await
        .unwrap();
    assert!(claimed.deliveries.is_empty());
    assert!(claimed.next_due_in.is_none_or(|wait| wait <= LEASE));
    // Every store looks as far as a look does.
    harness.pass(60 * SECOND - LOOK_AHEAD / 2).await;
    let claimed = store.claim_deliveries("accounting", lane, LEASE).await;
    let claimed = claimed.unwrap();
    let is_said = (claimed.next_due_in).is_some_and(|wait| wait <= LOOK_AHEAD / 2);
    // On a slow machine it is due by then.
    let is_due = claimed.deliveries.iter().any(|one| one.id == id(1));
    assert!(is_said || is_due, "{claimed:?}");
    harness.pass(61 * SECOND).await;
    let ids: Vec<_> = claim(&*store, "accounting", 10)
        .await
        .into_iter()
        .map(|c| c.id)
        .collect();
    assert!(ids.contains(&id(1)));
}

async fn look(store: &dyn Store) -> Due {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let subscriptions = names(&["accounting", "points", "nobody"]);
    let producers = names(&["payment", "nobody"]);
    store.due(subscriptions, producers).await.unwrap()
}

fn only(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(crate) async fn a_look_sees_what_is_due_and_for_whom(harness: &impl Harness) {
    let store = ready(harness).await;
    assert_eq!(look(&*store).await, Due::default());
    prepare(&*store, vec![message(1)]).await;
    assert_eq!(look(&*store).await.checks, only(&[]));
    harness.pass(CHECK_AFTER + SECOND).await;
    let due = look(&*store).await;
    assert_eq!((due.checks, due.to_send), (only(&["payment"]), only(&[])));
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    let due = look(&*store).await;
    assert_eq!((due.checks, due.alone), (only(&[]), only(&[])));
    assert_eq!(due.to_send, only(&["accounting", "points"]));
    // What is leased is due again when its lease has ended.
    assert_eq!(claim(&*store, "points", 1).await.len(), 1);
    assert_eq!(look(&*store).await.to_send, only(&["accounting"]));
    harness.pass(LEASE + SECOND).await;
    assert_eq!(look(&*store).await.to_send, only(&["accounting", "points"]));
    // What was sent is looked at when its answer is overdue.
    let generation = send(&*store, 1).await;
    let due = look(&*store).await;
    assert_eq!((due.to_send, due.overdue), (only(&["points"]), only(&[])));
    harness.pass(RESEND_AFTER + SECOND).await;
    assert_eq!(look(&*store).await.overdue, only(&["accounting"]));
    let id = id(1);
    let returned = vec![Returned { id, generation }];
    let returned = store.return_deliveries("accounting", returned, true).await;
    assert_eq!(returned.unwrap(), 1);
    let due = look(&*store).await;
    assert_eq!((due.overdue, due.alone), (only(&[]), only(&["accounting"])));
    assert_eq!(due.to_send, only(&["points"]));
}

pub(crate) async fn a_look_says_when_the_next_is_due_if_that_is_soon(harness: &impl Harness) {
    let store = ready(harness).await;
    let delayed = |n, wait| NewMessage {
        deliver_after: Some(store.now().after(wait)),
        ..message(n)
    };
    let publish = async |message| store.publish(vec![message], Handoff::none()).await.unwrap();
    publish(delayed(1, 100 * SECOND)).await;
    assert_eq!(look(&*store).await, Due::default());
    publish(delayed(2, LOOK_AHEAD / 2)).await;
    let due = look(&*store).await;
    // Unless it is due by now.
    assert!(
        due.next_in.is_some_and(|wait| wait <= LOOK_AHEAD / 2) || !due.to_send.is_empty(),
        "{due:?}"
    );
    harness.pass(LOOK_AHEAD).await;
    let due = look(&*store).await;
    assert_eq!(due.to_send, only(&["accounting", "points"]));
}

pub(crate) async fn a_claim_takes_the_oldest_due_first_and_raises_the_generation(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    for n in [3, 1, 2] {
        published(&*store, [n]).await;
        harness.pass(SECOND).await;
    }
    let claims = claim(&*store, "accounting", 2).await;
    assert_eq!(
        claims.iter().map(|c| c.id).collect::<Vec<_>>(),
        [id(3), id(1)]
    );
    assert!(
        claims
            .iter()
            .all(|c| c.generation == 1 && c.sent_at == c.first_sent_at)
    );
    assert_eq!(claim(&*store, "accounting", 10).await[0].id, id(2));
    assert!(claim(&*store, "accounting", 10).await.is_empty());
    assert_eq!(claim(&*store, "points", 10).await.len(), 3);
}

pub(crate) async fn a_claim_respects_bytes_but_takes_at_least_one(harness: &impl Harness) {
    let store = ready(harness).await;
    let large = |n| NewMessage {
        payload: vec![1; 1000],
        ..message(n)
    };
    store
        .publish(vec![large(1), large(2), large(3)], Handoff::none())
        .await
        .unwrap();
    let mut taken = Vec::new();
    for max_bytes in [1, 2_500] {
        let lane = Lane::Normal {
            limit: 10,
            max_bytes,
        };
        let claimed = store
            .claim_deliveries("accounting", lane, LEASE)
            .await
            .unwrap();
        taken.push(claimed.deliveries.len());
    }
    assert_eq!(taken, [1, 2]);
}

pub(crate) async fn a_lease_that_ran_out_is_claimed_again_and_its_holder_changes_nothing(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let stale = claim(&*store, "accounting", 1).await.remove(0);
    harness.pass(LEASE + SECOND).await;
    let fresh = claim(&*store, "accounting", 1).await.remove(0);
    assert_eq!(fresh.generation, 2);
    assert_eq!(fresh.first_sent_at, stale.first_sent_at);
    let late = vec![Sent {
        id: id(1),
        token: stale.token,
    }];
    assert_eq!(
        store
            .renew("accounting", late.clone(), LEASE)
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        store
            .mark_sent("accounting", late, RESEND_AFTER)
            .await
            .unwrap(),
        0
    );
    let returned = vec![Returned {
        id: id(1),
        generation: stale.generation,
    }];
    assert_eq!(
        store
            .return_deliveries("accounting", returned, true)
            .await
            .unwrap(),
        0
    );
    assert_eq!(delivery(&*store, 1).await.state, DeliveryState::Pending);
    let now = vec![Sent {
        id: id(1),
        token: fresh.token,
    }];
    assert_eq!(
        store
            .mark_sent("accounting", now, RESEND_AFTER)
            .await
            .unwrap(),
        1
    );
    assert_eq!(delivery(&*store, 1).await.state, DeliveryState::Sent);
}

pub(crate) async fn a_renewed_lease_holds_longer(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let held = claim(&*store, "accounting", 1).await.remove(0);
    harness.pass(LEASE - SECOND).await;
    let renewal = vec![Sent {
        id: id(1),
        token: held.token,
    }];
    assert_eq!(store.renew("accounting", renewal, LEASE).await.unwrap(), 1);
    harness.pass(LEASE - SECOND).await;
    assert!(claim(&*store, "accounting", 1).await.is_empty());
    harness.pass(2 * SECOND).await;
    assert_eq!(claim(&*store, "accounting", 1).await.len(), 1);
}

pub(crate) async fn the_fresh_lane_takes_only_what_was_confirmed_lately(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1, 2]).await;
    let held = claim(&*store, "accounting", 1).await.remove(0);
    harness.pass(FRESH_FOR + SECOND).await;
    // Due again only now, but confirmed long ago.
    assert_eq!(give_back(&*store, &held, NotSent::Untried).await, 1);
    published(&*store, [3, 4]).await;
    let fresh = |limit, max_bytes| Lane::Fresh { limit, max_bytes };
    let mut taken = Vec::new();
    for lane in [fresh(10, 1), fresh(10, usize::MAX), fresh(10, usize::MAX)] {
        let claimed = store
            .claim_deliveries("accounting", lane, LEASE)
            .await
            .unwrap();
        taken.push(claimed.deliveries.len());
        assert!(claimed.deliveries.iter().all(|claim| claim.id >= id(3)));
        assert_eq!(claimed.next_due_in, Some(Duration::ZERO), "the old ones");
    }
    assert_eq!(taken, [1, 1, 0]);
    assert_eq!(claim(&*store, "accounting", 10).await.len(), 2);
}

pub(crate) async fn what_was_not_tried_is_due_at_once_and_nothing_is_noted(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let first = claim(&*store, "accounting", 1).await.remove(0);
    assert_eq!(give_back(&*store, &first, NotSent::Untried).await, 1);
    let second = claim(&*store, "accounting", 1).await.remove(0);
    assert_eq!(second.generation, 2);
    assert_eq!(
        give_back(&*store, &first, NotSent::Untried).await,
        0,
        "its lease is lost"
    );
    assert!(claim(&*store, "accounting", 1).await.is_empty());
    let view = delivery(&*store, 1).await;
    assert_eq!((view.attempts, view.last_error), (0, None));
    assert!(shown(&*store, 1).await.events.is_empty());
    assert_eq!(
        store
            .return_unsent(
                "points",
                vec![Unsent {
                    id: id(1),
                    token: second.token,
                    why: NotSent::Untried
                }]
            )
            .await
            .unwrap(),
        0,
        "another's lease"
    );
}

pub(crate) async fn what_a_queue_refused_waits_and_says_why(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let held = claim(&*store, "accounting", 1).await.remove(0);
    let refused = NotSent::Refused {
        reason: "312 NO_ROUTE".into(),
        retry_after: 5 * SECOND,
    };
    assert_eq!(give_back(&*store, &held, refused).await, 1);
    assert!(claim(&*store, "accounting", 1).await.is_empty());
    let view = delivery(&*store, 1).await;
    assert_eq!((view.state, view.attempts), (DeliveryState::Pending, 0));
    assert_eq!(view.last_error.as_deref(), Some("312 NO_ROUTE"));
    let events = shown(&*store, 1).await.events;
    assert_eq!(events.len(), 1);
    assert_eq!(
        (events[0].kind.as_str(), events[0].detail.as_str()),
        ("returned", "312 NO_ROUTE")
    );
    harness.pass(6 * SECOND).await;
    assert_eq!(
        claim(&*store, "accounting", 1).await.len(),
        1,
        "not alone: the queue is to blame"
    );
}

pub(crate) async fn a_suspect_is_sent_alone_and_dead_after_three_closes(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let mut held = claim(&*store, "accounting", 1).await.remove(0);
    for close in 1..=3 {
        let suspect = NotSent::Suspect {
            reason: "501 FRAME_ERROR".into(),
        };
        assert_eq!(give_back(&*store, &held, suspect).await, 1);
        harness.pass(2 * SECOND).await;
        assert!(claim(&*store, "accounting", 1).await.is_empty());
        let mut alone = claim_alone(&*store).await;
        if close < 3 {
            held = alone.remove(0);
        }
        assert!(alone.is_empty());
    }
    let dead = delivery(&*store, 1).await;
    assert_eq!((dead.state, dead.attempts), (DeliveryState::Dead, 0));
    assert!(
        dead.last_error
            .is_some_and(|why| why.contains("501 FRAME_ERROR"))
    );
    let kinds: Vec<_> = shown(&*store, 1)
        .await
        .events
        .into_iter()
        .map(|event| event.kind)
        .collect();
    assert_eq!(kinds, ["returned", "returned", "returned", "dead"]);
}

pub(crate) async fn what_was_answered_or_sent_is_not_given_back(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1, 2, 3]).await;
    let claims = claim(&*store, "accounting", 3).await;
    let of = |n| claims.iter().find(|claim| claim.id == id(n)).unwrap();
    answer(&*store, 1, 1, AnswerKind::Consumed).await;
    answer(&*store, 2, 1, AnswerKind::Rejected("bad".into())).await;
    let sent = vec![Sent {
        id: id(3),
        token: of(3).token,
    }];
    store
        .mark_sent("accounting", sent, RESEND_AFTER)
        .await
        .unwrap();
    for (n, state) in [
        (1, DeliveryState::Consumed),
        (2, DeliveryState::Dead),
        (3, DeliveryState::Sent),
    ] {
        let refused = NotSent::Refused {
            reason: "late".into(),
            retry_after: SECOND,
        };
        assert_eq!(give_back(&*store, of(n), refused).await, 0);
        assert_eq!(delivery(&*store, n).await.state, state);
    }
}

pub(crate) async fn a_stream_that_ended_returns_its_deliveries_at_once_to_be_sent_alone(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    harness.pass(SECOND).await;
    published(&*store, [2]).await;
    let generation = send(&*store, 1).await;
    let returned = vec![Returned {
        id: id(1),
        generation,
    }];
    assert_eq!(
        store
            .return_deliveries("accounting", returned.clone(), true)
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        store
            .return_deliveries("accounting", returned, true)
            .await
            .unwrap(),
        0,
        "one end of one send counts once"
    );
    let view = delivery(&*store, 1).await;
    assert_eq!((view.state, view.attempts), (DeliveryState::Pending, 0));
    let lane = Lane::Normal {
        limit: 10,
        max_bytes: usize::MAX,
    };
    let claimed = store
        .claim_deliveries("accounting", lane, LEASE)
        .await
        .unwrap();
    assert_eq!(
        claimed.deliveries.iter().map(|c| c.id).collect::<Vec<_>>(),
        [id(2)]
    );
    assert!(claimed.alone_waits);
    assert_eq!(claim_alone(&*store).await.remove(0).id, id(1));
    assert!(claim_alone(&*store).await.is_empty());
}

pub(crate) async fn the_fifth_ended_stream_counts_as_failed(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    for end in 1..=5 {
        let generation = send(&*store, 1).await;
        let returned = vec![Returned {
            id: id(1),
            generation,
        }];
        store
            .return_deliveries("accounting", returned, true)
            .await
            .unwrap();
        assert_eq!(delivery(&*store, 1).await.attempts, u32::from(end == 5));
    }
    assert!(
        claim_alone(&*store).await.is_empty(),
        "it waits for the schedule's step"
    );
    assert!(delivery(&*store, 1).await.last_error.is_some());
}

pub(crate) async fn a_stream_that_the_service_ended_counts_nothing(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    for _ in 0..7 {
        let generation = send(&*store, 1).await;
        let returned = vec![Returned {
            id: id(1),
            generation,
        }];
        assert_eq!(
            store
                .return_deliveries("accounting", returned, false)
                .await
                .unwrap(),
            1
        );
    }
    assert_eq!(delivery(&*store, 1).await.attempts, 0);
    assert_eq!(
        claim(&*store, "accounting", 1).await.len(),
        1,
        "not alone either"
    );
}

pub(crate) async fn an_overdue_delivery_that_was_passed_by_is_due_again_and_counts(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    send(&*store, 1).await;
    assert!(store.overdue("accounting", 10).await.unwrap().is_empty());
    harness.pass(RESEND_AFTER + SECOND).await;
    let overdue = store.overdue("accounting", 10).await.unwrap();
    assert_eq!(overdue.len(), 1);
    let decisions = vec![(overdue[0], OverdueDecision::PassedBy)];
    // Two recovery passes that started at the same time.
    assert_eq!(
        store
            .settle_overdue("accounting", decisions.clone())
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        store.settle_overdue("accounting", decisions).await.unwrap(),
        0
    );
    assert_eq!(delivery(&*store, 1).await.attempts, 1);
    assert_eq!(send(&*store, 1).await, 2);
}

pub(crate) async fn waiting_longer_for_an_overdue_delivery_counts_nothing(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    send(&*store, 1).await;
    harness.pass(RESEND_AFTER + SECOND).await;
    let overdue = store.overdue("accounting", 10).await.unwrap()[0];
    let wait = vec![(overdue, OverdueDecision::Wait(RESEND_AFTER))];
    assert_eq!(store.settle_overdue("accounting", wait).await.unwrap(), 1);
    assert!(store.overdue("accounting", 10).await.unwrap().is_empty());
    let view = delivery(&*store, 1).await;
    assert_eq!((view.state, view.attempts), (DeliveryState::Sent, 0));
}

pub(crate) async fn a_delivery_older_than_max_age_is_dead(harness: &impl Harness) {
    let store = ready(harness).await;
    let mut aged = topology();
    aged.version = 2;
    if let Some(subscription) = aged.subscriptions.get_mut("accounting") {
        subscription.policy.max_age = Some(60 * SECOND);
    }
    store.apply_topology(aged).await.unwrap();
    published(&*store, [1, 2]).await;
    send(&*store, 1).await;
    assert_eq!(store.expire("accounting", 10).await.unwrap(), 0);
    harness.pass(61 * SECOND).await;
    published(&*store, [3]).await;
    assert_eq!(store.expire("accounting", 10).await.unwrap(), 2);
    assert_eq!(store.expire("accounting", 10).await.unwrap(), 0);
    assert_eq!(store.expire("points", 10).await.unwrap(), 0);
    let states = [
        delivery(&*store, 1).await,
        delivery(&*store, 2).await,
        delivery(&*store, 3).await,
    ]
    .map(|delivery| delivery.state);
    assert_eq!(
        states,
        [
            DeliveryState::Dead,
            DeliveryState::Dead,
            DeliveryState::Pending
        ]
    );
}
