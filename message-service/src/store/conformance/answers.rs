//! Consumers' answers.

use super::*;

pub(crate) async fn sent_is_not_written_over_an_answer(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let held = claim(&*store, "accounting", 1).await.remove(0);
    assert_eq!(
        answer(&*store, 1, held.generation, AnswerKind::Consumed).await,
        AnswerOutcome::Recorded
    );
    let late = vec![Sent {
        id: id(1),
        token: held.token,
    }];
    assert_eq!(
        store
            .mark_sent("accounting", late, RESEND_AFTER)
            .await
            .unwrap(),
        0
    );
    assert_eq!(delivery(&*store, 1).await.state, DeliveryState::Consumed);
}

pub(crate) async fn consumed_is_accepted_from_any_generation_and_state(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1, 2]).await;
    // Never sent.
    assert_eq!(
        answer(&*store, 1, 0, AnswerKind::Consumed).await,
        AnswerOutcome::Recorded
    );
    assert_eq!(
        answer(&*store, 1, 9, AnswerKind::Consumed).await,
        AnswerOutcome::Recorded
    );
    // DEAD.
    let generation = send(&*store, 2).await;
    answer(&*store, 2, generation, AnswerKind::Rejected("bad".into())).await;
    assert_eq!(delivery(&*store, 2).await.state, DeliveryState::Dead);
    assert_eq!(
        answer(&*store, 2, generation, AnswerKind::Consumed).await,
        AnswerOutcome::Recorded
    );
    for n in [1, 2] {
        let delivery = delivery(&*store, n).await;
        assert_eq!(delivery.state, DeliveryState::Consumed);
        assert!(delivery.answered_at.is_some() && delivery.due_at.is_none());
    }
}

pub(crate) async fn other_answers_count_once_and_only_for_the_current_generation(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    for generation in [0, 1] {
        assert_eq!(
            answer(&*store, 1, generation, failed()).await,
            AnswerOutcome::Stale
        );
    }
    assert_eq!(send(&*store, 1).await, 1);
    assert_eq!(answer(&*store, 1, 2, failed()).await, AnswerOutcome::Stale);
    assert_eq!(
        answer(&*store, 1, 1, failed()).await,
        AnswerOutcome::Recorded
    );
    assert_eq!(answer(&*store, 1, 1, failed()).await, AnswerOutcome::Stale);
    assert_eq!(delivery(&*store, 1).await.attempts, 1);
    harness.pass(4 * SECOND).await;
    assert_eq!(send(&*store, 1).await, 2);
    let rejected = AnswerKind::Rejected("old".into());
    assert_eq!(answer(&*store, 1, 1, rejected).await, AnswerOutcome::Stale);
    assert_eq!(delivery(&*store, 1).await.state, DeliveryState::Sent);
    answer(&*store, 1, 2, AnswerKind::Consumed).await;
    assert_eq!(answer(&*store, 1, 2, failed()).await, AnswerOutcome::Stale);
}

pub(crate) async fn answers_of_one_list_are_taken_one_after_the_other(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, 1..=4).await;
    let sent = claim(&*store, "accounting", 10).await;
    assert!(sent.iter().all(|claim| claim.generation == 1));
    let rejected = || AnswerKind::Rejected("bad".into());
    let answers = [
        (1, AnswerKind::Consumed),
        (2, failed()),
        (2, failed()),
        (3, rejected()),
        (2, AnswerKind::Consumed),
        (3, AnswerKind::Consumed),
        (1, failed()),
        (4, AnswerKind::Consumed),
    ];
    let answers = answers.map(|(n, kind)| Answer {
        id: id(n),
        generation: 1,
        sent_at: None,
        kind,
    });
    let (recorded, stale) = (AnswerOutcome::Recorded, AnswerOutcome::Stale);
    let outcomes = store.acknowledge("accounting", answers.to_vec()).await;
    assert_eq!(
        outcomes.unwrap(),
        [
            recorded, recorded, stale, recorded, recorded, recorded, stale, recorded
        ]
    );
    for n in 1..=4 {
        assert_eq!(delivery(&*store, n).await.state, DeliveryState::Consumed);
    }
    assert_eq!(delivery(&*store, 2).await.attempts, 1);
    assert!(claim(&*store, "accounting", 10).await.is_empty());
    assert_eq!(claim(&*store, "points", 10).await.len(), 4);
}

pub(crate) async fn an_answer_for_nothing_is_no_such_delivery(harness: &impl Harness) {
    let store = ready(harness).await;
    prepare(&*store, vec![message(1)]).await;
    published(&*store, [2]).await;
    let answers = [1, 2, 3].map(|n| Answer {
        id: id(n),
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    });
    let nothing = AnswerOutcome::NoSuchDelivery;
    let outcomes = store
        .acknowledge("accounting", answers.to_vec())
        .await
        .unwrap();
    assert_eq!(outcomes, [nothing, AnswerOutcome::Recorded, nothing]);
    let outcomes = store.acknowledge("nobody", answers.to_vec()).await.unwrap();
    assert_eq!(outcomes, [nothing; 3]);
}

pub(crate) async fn failed_follows_the_schedule_and_ends_dead_with_its_reason(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    // Ten per cent of jitter on steps of 3 s and 8 s.
    for (least, most) in [(2_700, 3_300), (7_200, 8_800)] {
        let generation = send(&*store, 1).await;
        let now = store.now();
        answer(&*store, 1, generation, failed()).await;
        let due = delivery(&*store, 1)
            .await
            .due_at
            .expect("due again")
            .since(now);
        assert!((least..=most + 100).contains(&due.as_millis()), "{due:?}");
        assert!(claim(&*store, "accounting", 1).await.is_empty());
        harness.pass(10 * SECOND).await;
    }
    let generation = send(&*store, 1).await;
    answer(
        &*store,
        1,
        generation,
        AnswerKind::Failed("the last".into()),
    )
    .await;
    let dead = delivery(&*store, 1).await;
    assert_eq!((dead.state, dead.attempts), (DeliveryState::Dead, 3));
    assert_eq!(dead.last_error.as_deref(), Some("the last"));
    harness.pass(1000 * SECOND).await;
    assert!(claim(&*store, "accounting", 1).await.is_empty());
    assert_eq!(
        claim(&*store, "points", 1).await.len(),
        1,
        "the neighbour is not touched"
    );
}

pub(crate) async fn later_does_not_count(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    for _ in 0..6 {
        let generation = send(&*store, 1).await;
        let later = AnswerKind::Later(20 * SECOND);
        assert_eq!(
            answer(&*store, 1, generation, later.clone()).await,
            AnswerOutcome::Recorded
        );
        assert_eq!(
            answer(&*store, 1, generation, later).await,
            AnswerOutcome::Stale
        );
        assert!(claim(&*store, "accounting", 1).await.is_empty());
        harness.pass(21 * SECOND).await;
    }
    assert_eq!(delivery(&*store, 1).await.attempts, 0);
}

pub(crate) async fn rejected_is_dead_at_once(harness: &impl Harness) {
    let store = ready(harness).await;
    published(&*store, [1]).await;
    let generation = send(&*store, 1).await;
    answer(
        &*store,
        1,
        generation,
        AnswerKind::Rejected("broken data".into()),
    )
    .await;
    let dead = delivery(&*store, 1).await;
    assert_eq!((dead.state, dead.attempts), (DeliveryState::Dead, 0));
    assert!(
        dead.last_error
            .is_some_and(|error| error.contains("broken data"))
    );
}
