//! Answers: nothing about one of them refuses the list.

use handfast_proto::v1 as proto;
use handfast_proto::v1::AnswerKind::{Consumed, Failed, Later, Rejected};
use handfast_proto::v1::AnswerOutcome::{Invalid, NoSuchDelivery, Recorded, Stale};
use handfast_service::store::Store as _;
use tonic::Code;
use tonic_types::RpcStatusExt as _;

use crate::world::*;

impl World {
    async fn outcomes(&mut self, answers: Vec<proto::Answer>) -> Vec<proto::AnswerOutcome> {
        let results = self.acknowledge("accounting", answers).await.unwrap();
        results.iter().map(proto::AnswerResult::outcome).collect()
    }

    /// Publishes messages and leases them to nobody in particular.
    async fn sent(&mut self, ids: std::ops::RangeInclusive<u128>) {
        let messages = ids.map(a_message).collect();
        self.publish("payment", messages).await.unwrap();
        self.claim("accounting").await;
    }
}

#[tokio::test]
async fn what_does_not_exist_is_an_item_and_never_an_error() {
    let mut world = World::start().await;
    world.sent(1..=1).await;
    let odd = |message_id| proto::Answer {
        message_id,
        ..an_answer(1, 1, Consumed)
    };
    let answers = vec![
        an_answer(9, 1, Consumed),
        odd(vec![0; 16]),
        odd(vec![1; 15]),
        odd(Vec::new()),
        an_answer(1, 1, Consumed),
    ];
    let expected = [
        NoSuchDelivery,
        NoSuchDelivery,
        NoSuchDelivery,
        NoSuchDelivery,
        Recorded,
    ];
    assert_eq!(world.outcomes(answers).await, expected);
    for unknown in ["nobody", "", "a\0b"] {
        let results = world
            .acknowledge(unknown, vec![an_answer(1, 1, Consumed)])
            .await;
        assert_eq!(results.unwrap()[0].outcome(), NoSuchDelivery, "{unknown:?}");
    }
}

#[tokio::test]
async fn malformed_answers_are_refused_one_by_one() {
    let mut world = World::start().await;
    world.sent(1..=2).await;
    let later = |later_ms| proto::Answer {
        later_ms,
        ..an_answer(1, 1, Later)
    };
    let unknown = proto::Answer {
        kind: 77,
        ..an_answer(1, 1, Later)
    };
    let answers = vec![
        later(-1),
        later(604_800_001),
        unknown,
        later(604_800_000),
        an_answer(2, 1, Consumed),
    ];
    let results = world.acknowledge("accounting", answers).await.unwrap();
    let outcomes: Vec<_> = results.iter().map(proto::AnswerResult::outcome).collect();
    assert_eq!(outcomes, [Invalid, Invalid, Invalid, Recorded, Recorded]);
    let fields = [
        "answers[0].later_ms",
        "answers[1].later_ms",
        "answers[2].kind",
    ];
    for (result, field) in results.iter().zip(fields) {
        let status = result.error.as_ref().unwrap();
        assert_eq!(Code::from(status.code), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
}

#[tokio::test]
async fn done_is_accepted_whatever_was_before() {
    let mut world = World::start().await;
    world.publish("payment", vec![a_message(1)]).await.unwrap();
    // Never sent, so only the truth "done" is taken; the rest speaks of no send.
    let early = vec![an_answer(1, 1, Failed), an_answer(1, 0, Consumed)];
    assert_eq!(world.outcomes(early).await, [Stale, Recorded]);
    let late = vec![
        an_answer(1, 1, Consumed),
        an_answer(1, 1, Failed),
        an_answer(1, 1, Rejected),
    ];
    assert_eq!(world.outcomes(late).await, [Recorded, Stale, Stale]);
}

#[tokio::test]
async fn a_dead_and_a_skipped_delivery_still_become_consumed() {
    let mut world = World::start().await;
    world.sent(1..=2).await;
    let rejected = vec![an_answer(1, 1, Rejected)];
    assert_eq!(world.outcomes(rejected).await, [Recorded]);
    let after_death = vec![an_answer(1, 1, Failed), an_answer(1, 1, Consumed)];
    assert_eq!(world.outcomes(after_death).await, [Stale, Recorded]);

    let mut without = topology(2);
    without.subscriptions.remove("accounting");
    world.store.apply_topology(without.clone()).await.unwrap();
    world.topology.set(without);
    let after_skip = vec![an_answer(2, 1, Later), an_answer(2, 1, Consumed)];
    assert_eq!(world.outcomes(after_skip).await, [Stale, Recorded]);
}

#[tokio::test]
async fn an_answer_to_an_earlier_send_counts_only_if_it_says_done() {
    let mut world = World::start().await;
    world.sent(1..=1).await;
    let again = vec![an_answer(1, 1, Later)];
    assert_eq!(world.outcomes(again).await, [Recorded]);
    assert_eq!(world.claim("accounting").await[0].generation, 2);
    let old = vec![
        an_answer(1, 1, Failed),
        an_answer(1, 3, Rejected),
        an_answer(1, 1, Consumed),
    ];
    assert_eq!(world.outcomes(old).await, [Stale, Stale, Recorded]);
}
