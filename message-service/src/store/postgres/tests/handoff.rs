//! Deliveries that a confirm leases to its own process.

use super::*;

fn room(of: &[(&str, usize)]) -> Handoff {
    let room = of.iter().map(|(name, room)| ((*name).to_owned(), *room));
    Handoff {
        lease: LEASE,
        room: room.collect(),
    }
}

fn numbers(handed: &[Handed], subscription: &str) -> usize {
    let of = handed.iter().filter(|one| one.subscription == subscription);
    of.count()
}

fn sent(handed: &[Handed]) -> Vec<Sent> {
    let sent = |one: &Handed| Sent {
        id: one.id,
        token: one.token,
    };
    handed.iter().map(sent).collect()
}

async fn claimed(store: &PostgresStore, subscription: &str) -> Vec<DeliveryClaim> {
    let claimed = store.claim_deliveries(subscription, normal(100), LEASE);
    claimed.await.unwrap().deliveries
}

async fn confirmed(store: &PostgresStore, handoff: Handoff) -> Written {
    let messages = (1..=5).map(paid).collect();
    store.prepare(messages, CHECK_AFTER).await.unwrap();
    let decisions = (1..=5).map(confirm).collect();
    store.decide("payment", decisions, handoff).await.unwrap()
}

#[tokio::test]
async fn a_confirm_leases_what_there_is_room_for_and_leaves_the_rest_due() {
    let harness = ready().await;
    let store = &harness.store;
    let written = confirmed(store, room(&[("accounting", 3), ("nobody", 9)])).await;
    assert_eq!(written.handed.len(), 3);
    assert_eq!(numbers(&written.handed, "accounting"), 3);
    assert_eq!(written.topics, [TOPIC.to_owned()].into(), "the rest is due");
    assert_eq!(claimed(store, "accounting").await.len(), 2);
    assert_eq!(claimed(store, "points").await.len(), 5);
    let loaded = store.load(written.handed.clone()).await.unwrap();
    for (one, claim) in written.handed.iter().zip(&loaded) {
        let claim = claim.as_ref().unwrap();
        assert_eq!((claim.id, claim.generation), (one.id, 1));
        assert_eq!((claim.payload.len(), one.body_bytes), (100, 100));
        assert_eq!(claim.sent_at, one.sent_at);
    }
    let marked = store.mark_sent("accounting", sent(&written.handed), LEASE);
    assert_eq!(marked.await.unwrap(), 3);
}

#[tokio::test]
async fn what_is_leased_to_its_process_is_due_for_nobody() {
    let harness = ready().await;
    let store = &harness.store;
    let written = confirmed(store, room(&[("accounting", 5), ("points", 9)])).await;
    assert_eq!(written.handed.len(), 10);
    assert!(written.topics.is_empty(), "nobody need look");
    assert!(claimed(store, "accounting").await.is_empty());
    let answers = vec![consumed(1), consumed(2)];
    let outcomes = store.acknowledge("accounting", answers).await.unwrap();
    assert_eq!(outcomes, [AnswerOutcome::Recorded; 2]);
}

#[tokio::test]
async fn calls_that_are_joined_share_what_they_may_lease_together() {
    let harness = ready().await;
    let store = harness.store.clone();
    let calls = (1..=200).map(|n| {
        let store = store.clone();
        async move {
            let handoff = room(&[("accounting", 1)]);
            let written = store.publish(vec![paid(n)], handoff).await.unwrap();
            assert!(written.handed.iter().all(|one| one.id == id(n)));
            written.handed.len()
        }
    });
    let handed: usize = futures_util::future::join_all(calls).await.iter().sum();
    assert_eq!(handed, 200);
}

#[tokio::test]
async fn what_is_to_be_delivered_later_is_not_leased() {
    let harness = ready().await;
    let store = &harness.store;
    let later = NewMessage {
        deliver_after: Some(store.now().after(Duration::from_secs(60))),
        ..paid(1)
    };
    let messages = vec![later, paid(2)];
    let written = store.publish(messages, room(&[("accounting", 9)])).await;
    let handed = written.unwrap().handed;
    assert_eq!(handed.iter().map(|one| one.id).collect::<Vec<_>>(), [id(2)]);
}

#[tokio::test]
async fn what_its_process_does_not_send_is_sent_by_another_when_the_lease_has_ended() {
    let harness = open_with_clock().await;
    let store = &harness.store;
    let topology = topology(1, &["accounting"]);
    store.apply_topology(topology).await.unwrap();
    let written = confirmed(store, room(&[("accounting", 5)])).await;
    let another = harness.another().await;
    assert!(claimed(&another, "accounting").await.is_empty());
    harness.pass(LEASE).await;
    let claims = claimed(&another, "accounting").await;
    assert_eq!(claims.len(), 5);
    assert!(claims.iter().all(|claim| claim.generation == 2));
    // Whoever wakes up behind its lease changes nothing.
    let late = store.mark_sent("accounting", sent(&written.handed), LEASE);
    assert_eq!(late.await.unwrap(), 0);
}

#[tokio::test]
async fn what_is_given_back_untried_is_due_at_once_for_anybody() {
    let harness = ready().await;
    let store = &harness.store;
    let written = confirmed(store, room(&[("accounting", 5)])).await;
    let unsent = |one: &Handed| Unsent {
        id: one.id,
        token: one.token,
        why: crate::store::NotSent::Untried,
    };
    let unsent = written.handed.iter().map(unsent).collect();
    let returned = store.return_unsent("accounting", unsent).await.unwrap();
    assert_eq!(returned, 5);
    let another = harness.another().await;
    assert_eq!(claimed(&another, "accounting").await.len(), 5);
}
