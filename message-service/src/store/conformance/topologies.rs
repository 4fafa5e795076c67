//! The topology in the store.

use super::*;

pub(crate) async fn a_topology_is_applied_once_and_an_older_one_is_not(harness: &impl Harness) {
    let store = harness.store();
    assert_eq!(store.topology().await.unwrap().version, 0);
    let mut newer = topology();
    newer.version = 5;
    if let Some(producer) = newer.producers.get_mut("shop") {
        producer.status_endpoint = None;
    }
    if let Some(subscription) = newer.subscriptions.get_mut("points") {
        subscription.policy.attempts = Attempts::Unlimited;
        subscription.policy.max_age = Some(SECOND);
    }
    if let Some(topic) = newer.topics.get_mut(TOPIC) {
        topic.producers.insert("payment".into());
    }
    assert_eq!(
        store.apply_topology(newer.clone()).await.unwrap(),
        Applied::Changed
    );
    assert_eq!(store.topology().await.unwrap(), newer);
    assert_eq!(
        store.apply_topology(newer.clone()).await.unwrap(),
        Applied::Unchanged
    );
    let older = Applied::Older { in_force: 5 };
    assert_eq!(store.apply_topology(topology()).await.unwrap(), older);
    assert_eq!(store.topology().await.unwrap(), newer);
}

pub(crate) async fn a_changed_topology_needs_a_new_version(harness: &impl Harness) {
    let store = ready(harness).await;
    let mut changed = topology();
    changed.subscriptions.remove("points");
    let error = store.apply_topology(changed).await.unwrap_err();
    assert!(
        matches!(error, Error::TopologyVersionReused { version: 1 }),
        "{error}"
    );
    assert_eq!(store.topology().await.unwrap(), topology());
}

pub(crate) async fn a_removed_subscription_skips_what_is_open(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1, 2]).await;
    let claims = claim(&*store, "accounting", 1).await;
    let first = claims[0].id;
    let mut without = topology();
    without.version = 2;
    without.subscriptions.remove("accounting");
    store.apply_topology(without).await.unwrap();
    assert_eq!(store.removed_subscriptions().await.unwrap(), ["accounting"]);
    assert!(claim(&*store, "accounting", 10).await.is_empty());
    assert_eq!(claim(&*store, "points", 10).await.len(), 2);
    for n in [1, 2] {
        let skipped = delivery(&*store, n).await;
        assert_eq!(skipped.state, DeliveryState::Skipped);
        assert!(
            skipped
                .last_error
                .is_some_and(|why| why.contains("version 2"))
        );
    }
    published(&*store, [3]).await;
    assert_eq!(shown(&*store, 3).await.deliveries.len(), 1);
    // What was on its way when the subscription went may still turn out done.
    let done = Answer {
        id: first,
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    };
    let outcomes = store.acknowledge("accounting", vec![done]).await.unwrap();
    assert_eq!(outcomes, [AnswerOutcome::Recorded]);
}

pub(crate) async fn a_subscription_gets_what_is_confirmed_after_it_became_active(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    prepare(&*store, vec![message(2)]).await;
    let mut with = topology();
    with.version = 2;
    let policy = DeliveryPolicy::default();
    with.subscriptions.insert(
        "search".into(),
        Subscription {
            topic: TOPIC.into(),
            policy,
            max_in_queue: None,
            amqp_user: None,
        },
    );
    store.apply_topology(with).await.unwrap();
    decide(&*store, 2, MessageEvent::Confirm).await.unwrap();
    let claims = claim(&*store, "search", 10).await;
    assert_eq!(
        claims.iter().map(|claim| claim.id).collect::<Vec<_>>(),
        [id(2)]
    );
}

pub(crate) async fn a_producer_with_prepared_messages_is_not_removed(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let mut without = topology();
    without.version = 2;
    without.producers.remove("payment");
    let error = store.apply_topology(without.clone()).await.unwrap_err();
    assert!(
        matches!(error, Error::ProducerHasPrepared { prepared: 1, .. }),
        "{error}"
    );
    assert_eq!(store.topology().await.unwrap(), topology());
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    assert_eq!(
        store.apply_topology(without).await.unwrap(),
        Applied::Changed
    );
}

pub(crate) async fn a_producer_with_prepared_messages_keeps_its_status_endpoint(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    let endpoint = |version, endpoint: Option<&str>| {
        let mut topology = topology();
        topology.version = version;
        let payment = topology.producers.get_mut("payment").unwrap();
        payment.status_endpoint = endpoint.map(str::to_owned);
        topology
    };
    let here = endpoint(2, Some("http://127.0.0.1:7411"));
    store.apply_topology(here.clone()).await.unwrap();
    prepare(&*store, vec![message(1)]).await;
    let error = store.apply_topology(endpoint(3, None)).await.unwrap_err();
    assert!(
        matches!(error, Error::ProducerHasPrepared { prepared: 1, .. }),
        "{error}"
    );
    assert_eq!(store.topology().await.unwrap(), here);
    let elsewhere = endpoint(3, Some("http://127.0.0.1:7511"));
    let moved = store.apply_topology(elsewhere).await.unwrap();
    assert_eq!(moved, Applied::Changed);
    decide(&*store, 1, MessageEvent::Cancel).await.unwrap();
    let applied = store.apply_topology(endpoint(4, None)).await.unwrap();
    assert_eq!(applied, Applied::Changed);
}
