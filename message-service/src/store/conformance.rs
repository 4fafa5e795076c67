//! What every store promises, as one list of claims.
//!
//! A store passes by calling [`conformance_suite!`] with a function that opens an empty one
//! behind a [`Harness`]. A claim speaks only of the port, so the next store has to pass the
//! same list unchanged.

pub(crate) mod answers;
pub(crate) mod checks;
pub(crate) mod deliveries;
pub(crate) mod messages;
pub(crate) mod replicas;
pub(crate) mod topologies;
pub(crate) mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::*;
use crate::message::{AnswerKind, Attempts, CheckPolicy, DeliveryPolicy, Effect};
use crate::topology::{Producer, Subscription, Topic};

/// An opened store and its surroundings.
#[async_trait]
pub(crate) trait Harness: Send + Sync {
    /// The store.
    fn store(&self) -> Arc<dyn Store>;
    /// Lets this much time pass on the store's clock.
    async fn pass(&self, span: Duration);
    /// Writes a state that no version knows yet into a delivery or a message.
    async fn write_unknown_state(&self, table: &str, id: MessageId);
}

/// Runs every claim against the store that `$open` gives.
macro_rules! conformance_suite {
    ($open:path) => {
        $crate::store::conformance::each_claim!($open);
    };
}
pub(crate) use conformance_suite;

macro_rules! claims {
    ($($group:ident::$name:ident)*) => {
        macro_rules! each_claim {
            ($open:path) => {
                $(
                    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                    async fn $name() {
                        let harness = $open().await;
                        $crate::store::conformance::$group::$name(&harness).await;
                        $crate::store::Store::close(&*harness.store()).await;
                    }
                )*
            };
        }
        pub(crate) use each_claim;
    };
}

claims! {
    messages::a_prepared_message_is_kept_and_delivered_to_nobody
    messages::a_repeated_prepare_answers_as_the_first_time
    messages::the_same_id_with_other_content_is_refused_and_nothing_changes
    messages::another_producers_id_is_refused_without_its_state
    messages::the_same_id_twice_in_one_list_is_a_repeat
    messages::the_first_of_two_with_one_key_in_one_list_is_the_holder
    messages::a_held_key_names_its_holder_and_has_it_checked_at_once
    messages::a_cancelled_message_releases_its_key
    messages::a_key_is_held_per_producer_and_topic
    messages::confirming_creates_one_delivery_per_active_subscription
    messages::a_repeated_confirm_creates_nothing
    messages::a_confirm_after_a_cancel_is_a_conflict_and_the_reverse_too
    messages::another_producers_message_cannot_be_decided
    messages::publishing_is_preparing_and_confirming_in_one_write
    messages::publishing_what_was_prepared_confirms_it
    deliveries::a_body_comes_back_as_it_was_handed_over
    deliveries::a_claim_reads_each_body_from_its_bucket
    deliveries::a_delivery_waits_for_its_time
    deliveries::a_look_sees_what_is_due_and_for_whom
    deliveries::a_look_says_when_the_next_is_due_if_that_is_soon
    deliveries::a_claim_takes_the_oldest_due_first_and_raises_the_generation
    deliveries::a_claim_respects_bytes_but_takes_at_least_one
    deliveries::a_lease_that_ran_out_is_claimed_again_and_its_holder_changes_nothing
    deliveries::a_renewed_lease_holds_longer
    answers::sent_is_not_written_over_an_answer
    answers::consumed_is_accepted_from_any_generation_and_state
    answers::other_answers_count_once_and_only_for_the_current_generation
    answers::answers_of_one_list_are_taken_one_after_the_other
    answers::an_answer_for_nothing_is_no_such_delivery
    answers::failed_follows_the_schedule_and_ends_dead_with_its_reason
    answers::later_does_not_count
    answers::rejected_is_dead_at_once
    deliveries::the_fresh_lane_takes_only_what_was_confirmed_lately
    deliveries::what_was_not_tried_is_due_at_once_and_nothing_is_noted
    deliveries::what_a_queue_refused_waits_and_says_why
    deliveries::a_suspect_is_sent_alone_and_dead_after_three_closes
    deliveries::what_was_answered_or_sent_is_not_given_back
    deliveries::a_stream_that_ended_returns_its_deliveries_at_once_to_be_sent_alone
    deliveries::the_fifth_ended_stream_counts_as_failed
    deliveries::a_stream_that_the_service_ended_counts_nothing
    deliveries::an_overdue_delivery_that_was_passed_by_is_due_again_and_counts
    deliveries::waiting_longer_for_an_overdue_delivery_counts_nothing
    deliveries::a_delivery_older_than_max_age_is_dead
    checks::checks_are_claimed_when_due_and_leased
    checks::a_verdict_decides_and_names_the_check
    checks::a_verdict_of_a_lost_lease_changes_nothing
    checks::undecided_checks_decay_and_end_unresolved_but_go_on
    checks::an_unanswered_check_does_not_count
    checks::undecided_messages_are_counted_up_to_a_limit
    topologies::a_topology_is_applied_once_and_an_older_one_is_not
    topologies::a_changed_topology_needs_a_new_version
    topologies::a_removed_subscription_skips_what_is_open
    topologies::a_subscription_gets_what_is_confirmed_after_it_became_active
    topologies::a_producer_with_prepared_messages_is_not_removed
    topologies::a_producer_with_prepared_messages_keeps_its_status_endpoint
    replicas::a_replica_is_listed_with_what_it_said_until_it_leaves
    replicas::who_says_that_it_is_there_hears_which_topology_is_in_force
    whole::what_was_finished_long_ago_is_removed_and_the_rest_is_carried_on
    whole::a_shorter_span_of_buckets_matters_at_once
    whole::a_row_in_an_unknown_state_is_left_alone_and_counted
    whole::concurrent_decisions_of_one_message_agree_on_one
    whole::concurrent_claims_never_share_a_delivery
    whole::a_dropped_call_is_done_as_a_whole_or_not_at_all
    whole::lists_page_through_everything_once
    whole::counts_add_up
    whole::the_backlog_is_what_is_unfinished
    checks::a_timeline_is_a_path_of_the_diagram
    whole::random_calls_keep_to_the_model
}

const TOPIC: &str = "payment.completed";
const CHECK_AFTER: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(30);
const RESEND_AFTER: Duration = Duration::from_secs(45);
const SECOND: Duration = Duration::from_secs(1);

/// Two producers; `payment.completed` with two subscriptions, `audit` with none.
fn topology() -> Topology {
    let topic = |alone| Topic {
        producers: BTreeSet::new(),
        may_have_no_subscriber: alone,
    };
    let subscription = || Subscription {
        topic: TOPIC.into(),
        policy: DeliveryPolicy {
            schedule: vec![3 * SECOND, 8 * SECOND],
            attempts: Attempts::Limited(3),
            max_age: None,
        },
        max_in_queue: None,
        amqp_user: None,
    };
    let producer = || Producer {
        status_endpoint: Some("http://127.0.0.1:1".into()),
        checks: CheckPolicy {
            check_after: CHECK_AFTER,
        },
    };
    Topology {
        version: 1,
        producers: BTreeMap::from([("payment".into(), producer()), ("shop".into(), producer())]),
        topics: BTreeMap::from([(TOPIC.into(), topic(false)), ("audit".into(), topic(true))]),
        subscriptions: BTreeMap::from([
            ("accounting".into(), subscription()),
            ("points".into(), subscription()),
        ]),
    }
}

async fn ready(harness: &impl Harness) -> Arc<dyn Store> {
    let store = harness.store();
    assert_eq!(
        store.apply_topology(topology()).await.unwrap(),
        Applied::Changed
    );
    store
}

fn message(n: u128) -> NewMessage {
    NewMessage {
        id: id(n),
        producer: "payment".into(),
        topic: TOPIC.into(),
        key: None,
        content_type: "application/json".into(),
        headers: vec![("trace".into(), "1".into())],
        payload: format!("{{\"n\":{n}}}").into_bytes(),
        deliver_after: None,
        fence: Some(Uuid::from_u128(77)),
    }
}

fn keyed(n: u128, key: &str) -> NewMessage {
    NewMessage {
        key: Some(key.into()),
        ..message(n)
    }
}

fn id(n: u128) -> MessageId {
    MessageId::from(Uuid::from_u128(n))
}

async fn prepare(store: &dyn Store, messages: Vec<NewMessage>) -> Vec<ItemResult> {
    store.prepare(messages, CHECK_AFTER).await.unwrap().items
}

async fn decide(store: &dyn Store, n: u128, event: MessageEvent) -> ItemResult {
    let decisions = vec![Decision { id: id(n), event }];
    store
        .decide("payment", decisions, Handoff::none())
        .await
        .unwrap()
        .items
        .remove(0)
}

async fn published(store: &dyn Store, numbers: impl IntoIterator<Item = u128>) {
    let messages = numbers.into_iter().map(message).collect();
    for item in store
        .publish(messages, Handoff::none())
        .await
        .unwrap()
        .items
    {
        assert_eq!(item, Ok(MessageState::Confirmed));
    }
}

async fn claim(store: &dyn Store, subscription: &str, limit: usize) -> Vec<DeliveryClaim> {
    let lane = Lane::Normal {
        limit,
        max_bytes: usize::MAX,
    };
    store
        .claim_deliveries(subscription, lane, LEASE)
        .await
        .unwrap()
        .deliveries
}

/// Gives a leased delivery of accounting back; returns how many were.
async fn give_back(store: &dyn Store, claim: &DeliveryClaim, why: NotSent) -> usize {
    let unsent = vec![Unsent {
        id: claim.id,
        token: claim.token,
        why,
    }];
    store.return_unsent("accounting", unsent).await.unwrap()
}

async fn claim_alone(store: &dyn Store) -> Vec<DeliveryClaim> {
    store
        .claim_deliveries("accounting", Lane::Alone, LEASE)
        .await
        .unwrap()
        .deliveries
}

/// Sends and marks SENT; returns the generation.
async fn send(store: &dyn Store, n: u128) -> u32 {
    let mut claims = claim(store, "accounting", 1).await;
    if claims.is_empty() {
        claims = claim_alone(store).await;
    }
    let claim = claims.pop().expect("a due delivery");
    assert_eq!(claim.id, id(n));
    let sent = vec![Sent {
        id: claim.id,
        token: claim.token,
    }];
    assert_eq!(
        store
            .mark_sent("accounting", sent, RESEND_AFTER)
            .await
            .unwrap(),
        1
    );
    claim.generation
}

async fn answer(store: &dyn Store, n: u128, generation: u32, kind: AnswerKind) -> AnswerOutcome {
    let answer = Answer {
        id: id(n),
        generation,
        sent_at: None,
        kind,
    };
    store
        .acknowledge("accounting", vec![answer])
        .await
        .unwrap()
        .remove(0)
}

async fn shown(store: &dyn Store, n: u128) -> Shown {
    store
        .show(id(n), false)
        .await
        .unwrap()
        .expect("the message")
}

/// The delivery of message `n` for accounting.
async fn delivery(store: &dyn Store, n: u128) -> DeliveryView {
    shown(store, n)
        .await
        .deliveries
        .into_iter()
        .find(|delivery| delivery.subscription == "accounting")
        .expect("a delivery for accounting")
}

fn failed() -> AnswerKind {
    AnswerKind::Failed("no".into())
}
