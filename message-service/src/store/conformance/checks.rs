//! Status checks and what they decide.

use super::*;

pub(crate) async fn checks_are_claimed_when_due_and_leased(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![keyed(1, "k")]).await;
    prepare(
        &*store,
        vec![NewMessage {
            producer: "shop".into(),
            ..message(2)
        }],
    )
    .await;
    assert!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    harness.pass(CHECK_AFTER).await;
    let claims = store.claim_checks("payment", 10, LEASE).await.unwrap();
    assert_eq!(claims.len(), 1);
    assert_eq!((claims[0].id, claims[0].checks), (id(1), 0));
    assert_eq!(claims[0].fence, Some(Uuid::from_u128(77)));
    assert_eq!(claims[0].key.as_deref(), Some("k"));
    assert!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    harness.pass(LEASE).await;
    assert_eq!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .len(),
        1
    );
}

async fn due_checks(harness: &impl Harness, store: &dyn Store) -> Vec<CheckClaim> {
    harness.pass(Duration::from_secs(3600)).await;
    store.claim_checks("payment", 100, LEASE).await.unwrap()
}

async fn settle(store: &dyn Store, results: Vec<(CheckClaim, CheckResult)>) -> usize {
    store
        .settle_checks("payment", CHECK_AFTER, results)
        .await
        .unwrap()
        .1
}

pub(crate) async fn a_verdict_decides_and_names_the_check(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1), message(2)]).await;
    let claims = due_checks(harness, &*store).await;
    let results = claims
        .into_iter()
        .map(|claim| {
            let committed = claim.id == id(1);
            (
                claim,
                if committed {
                    CheckResult::Committed
                } else {
                    CheckResult::RolledBack
                },
            )
        })
        .collect();
    let (topics, settled) = store
        .settle_checks("payment", CHECK_AFTER, results)
        .await
        .unwrap();
    assert_eq!((topics.len(), settled), (1, 2));
    for (n, state, deliveries) in [
        (1, MessageState::Confirmed, 2),
        (2, MessageState::Cancelled, 0),
    ] {
        let shown = shown(&*store, n).await;
        assert_eq!(shown.message.state, state);
        assert_eq!(shown.message.decided_by, Some(DecidedBy::Check));
        assert_eq!(
            (shown.message.checks, shown.deliveries.len()),
            (1, deliveries)
        );
    }
    // The producer's own word comes late and agrees.
    assert_eq!(
        decide(&*store, 1, MessageEvent::Confirm).await,
        Ok(MessageState::Confirmed)
    );
    assert_eq!(
        decide(&*store, 2, MessageEvent::Cancel).await,
        Ok(MessageState::Cancelled)
    );
}

pub(crate) async fn a_verdict_of_a_lost_lease_changes_nothing(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let stale = due_checks(harness, &*store).await.remove(0);
    let fresh = due_checks(harness, &*store).await.remove(0);
    assert_eq!(
        settle(&*store, vec![(stale, CheckResult::RolledBack)]).await,
        0
    );
    assert_eq!(
        shown(&*store, 1).await.message.state,
        MessageState::Prepared
    );
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    assert_eq!(
        settle(&*store, vec![(fresh, CheckResult::RolledBack)]).await,
        0
    );
    assert_eq!(
        shown(&*store, 1).await.message.decided_by,
        Some(DecidedBy::Producer)
    );
}

pub(crate) async fn undecided_checks_decay_and_end_unresolved_but_go_on(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let mut longest = Duration::ZERO;
    for checks in 1..=21 {
        let claim = due_checks(harness, &*store).await.remove(0);
        let now = store.now();
        let undecided = CheckResult::Undecided {
            in_progress: checks % 2 == 0,
        };
        assert_eq!(settle(&*store, vec![(claim, undecided)]).await, 1);
        let view = shown(&*store, 1).await.message;
        assert_eq!((view.checks, view.unresolved), (checks, checks >= 20));
        longest = view.check_at.expect("a next check").since(now);
    }
    assert!(longest <= CheckPolicy::SLOWEST.mul_f64(1.11), "{longest:?}");
    assert!(longest >= CheckPolicy::SLOWEST.mul_f64(0.89), "{longest:?}");
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    assert!(!shown(&*store, 1).await.message.unresolved);
}

pub(crate) async fn an_unanswered_check_does_not_count(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let claim = due_checks(harness, &*store).await.remove(0);
    let unanswered = CheckResult::Unanswered {
        retry_after: 5 * SECOND,
    };
    assert_eq!(settle(&*store, vec![(claim, unanswered)]).await, 1);
    assert_eq!(shown(&*store, 1).await.message.checks, 0);
    assert!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    harness.pass(6 * SECOND).await;
    assert_eq!(
        store
            .claim_checks("payment", 10, LEASE)
            .await
            .unwrap()
            .len(),
        1
    );
}

pub(crate) async fn undecided_messages_are_counted_up_to_a_limit(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, (1..=5).map(message).collect()).await;
    decide(&*store, 1, MessageEvent::Confirm).await.unwrap();
    assert_eq!(store.undecided("payment", 100).await.unwrap(), 4);
    assert_eq!(store.undecided("payment", 3).await.unwrap(), 3);
    assert_eq!(store.undecided("shop", 3).await.unwrap(), 0);
}

pub(crate) async fn a_timeline_is_a_path_of_the_diagram(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    let claim = due_checks(harness, &*store).await.remove(0);
    settle(&*store, vec![(claim, CheckResult::Committed)]).await;
    let generation = send(&*store, 1).await;
    answer(&*store, 1, generation, failed()).await;
    harness.pass(4 * SECOND).await;
    let generation = send(&*store, 1).await;
    answer(&*store, 1, generation, AnswerKind::Consumed).await;
    let shown = shown(&*store, 1).await;
    let view = &shown.message;
    assert!(Some(view.prepared_at) <= view.decided_at);
    let done = delivery(&*store, 1).await;
    assert!(view.decided_at <= done.first_sent_at && done.first_sent_at < done.sent_at);
    assert!(done.sent_at <= done.answered_at);
    let kinds: Vec<_> = shown
        .events
        .iter()
        .map(|event| event.kind.as_str())
        .collect();
    assert_eq!(kinds, ["check", "failed"]);
    assert!(
        shown
            .events
            .iter()
            .all(|event| event.at >= view.prepared_at)
    );
}
