use super::AnswerKind::*;
use super::*;
use crate::message::Attempts;

const NOW: Timestamp = Timestamp::from_micros(1_000_000_000);

fn policy() -> DeliveryPolicy {
    DeliveryPolicy {
        schedule: vec![Duration::from_secs(3), Duration::from_secs(8)],
        attempts: Attempts::Limited(3),
        max_age: None,
    }
}

/// Sent twice, the second send unanswered.
fn delivery(state: DeliveryState) -> Delivery {
    Delivery {
        state,
        attempts: 1,
        generation: 2,
        answered_generation: 1,
        laters: 0,
        stream_ends: 0,
        confirmed_at: Timestamp::from_micros(0),
        sent_at: Some(NOW),
    }
}

fn apply(delivery: &Delivery, event: DeliveryEvent<'_>) -> Outcome {
    delivery.apply(&event, &policy(), NOW, Chance::NONE)
}

fn answer(delivery: &Delivery, generation: u32, kind: &AnswerKind) -> Outcome {
    apply(delivery, DeliveryEvent::Answer(generation, kind))
}

fn again(
    seconds: u64,
    attempts: u32,
    laters: u32,
    stream_ends: u32,
    error: Option<&str>,
) -> Outcome {
    Outcome::Again {
        due_at: NOW.after(Duration::from_secs(seconds)),
        attempts,
        laters,
        stream_ends,
        error: error.map(str::to_owned),
    }
}

#[test]
fn every_pair_of_state_and_event_is_decided() {
    use DeliveryState::*;
    let failed = Failed("no".into());
    let rejected = Rejected("bad".into());
    let later = Later(Duration::from_secs(60));
    for state in DeliveryState::ALL {
        let it = delivery(state);
        let awaiting = matches!(state, Pending | Sent);
        let only_awaiting = |outcome: Outcome| if awaiting { outcome } else { Outcome::Stale };

        let consumed = if state == Consumed {
            Outcome::AlreadySo
        } else {
            Outcome::Consumed
        };
        for generation in [0, 1, 2, 3] {
            assert_eq!(
                answer(&it, generation, &AnswerKind::Consumed),
                consumed,
                "{state}"
            );
        }
        assert_eq!(
            answer(&it, 2, &failed),
            only_awaiting(again(8, 2, 0, 0, Some("no")))
        );
        assert_eq!(
            answer(&it, 2, &later),
            only_awaiting(again(60, 1, 1, 0, None))
        );
        let dead = Outcome::Dead {
            attempts: 1,
            error: "rejected: bad".into(),
        };
        assert_eq!(answer(&it, 2, &rejected), only_awaiting(dead));
        for stale in [0, 1, 3] {
            for kind in [&failed, &rejected, &later] {
                assert_eq!(answer(&it, stale, kind), Outcome::Stale, "{state} {stale}");
            }
        }
        assert_eq!(
            apply(&it, DeliveryEvent::PassedBy(2)),
            only_awaiting(again(
                8,
                2,
                0,
                0,
                Some("passed by: a later send was answered")
            ))
        );
        assert_eq!(apply(&it, DeliveryEvent::PassedBy(1)), Outcome::Stale);
        let ended = DeliveryEvent::StreamEnded {
            generation: 2,
            counts: true,
        };
        assert_eq!(apply(&it, ended), only_awaiting(again(0, 1, 0, 1, None)));
        let stopped = DeliveryEvent::StreamEnded {
            generation: 2,
            counts: false,
        };
        assert_eq!(apply(&it, stopped), only_awaiting(again(0, 1, 0, 0, None)));
        // Only what is PENDING can be leased.
        let only_leased = |outcome: Outcome| match state {
            Pending => outcome,
            Sent | Consumed | Dead | Skipped => Outcome::Stale,
        };
        let refused = DeliveryEvent::Refused {
            reason: "full",
            retry_after: Duration::from_secs(5),
        };
        assert_eq!(
            apply(&it, refused),
            only_leased(again(5, 1, 0, 0, Some("full")))
        );
        assert_eq!(
            apply(&it, DeliveryEvent::Suspected("504")),
            only_leased(again(1, 1, 0, 1, Some("504")))
        );
        assert_eq!(
            apply(&it, DeliveryEvent::Untried),
            only_leased(again(0, 1, 0, 0, None))
        );
        let too_old = Outcome::Dead {
            attempts: 1,
            error: "older than the subscription's max_age".into(),
        };
        assert_eq!(apply(&it, DeliveryEvent::TooOld), only_awaiting(too_old));
        let skip = match state {
            Pending | Sent | Dead => Outcome::Skipped,
            Skipped => Outcome::AlreadySo,
            Consumed => Outcome::Stale,
        };
        assert_eq!(apply(&it, DeliveryEvent::Skip), skip, "{state}");
    }
}

#[test]
fn an_answer_to_what_was_never_sent_is_stale_unless_it_says_done() {
    let never = Delivery {
        generation: 0,
        answered_generation: 0,
        ..delivery(DeliveryState::Pending)
    };
    assert_eq!(answer(&never, 0, &Failed("no".into())), Outcome::Stale);
    assert_eq!(answer(&never, 0, &Rejected("no".into())), Outcome::Stale);
    assert_eq!(answer(&never, 0, &AnswerKind::Consumed), Outcome::Consumed);
}

#[test]
fn a_generation_counts_once() {
    let counted = Delivery {
        answered_generation: 2,
        ..delivery(DeliveryState::Pending)
    };
    assert_eq!(answer(&counted, 2, &Failed("no".into())), Outcome::Stale);
    assert_eq!(apply(&counted, DeliveryEvent::PassedBy(2)), Outcome::Stale);
}

#[test]
fn the_last_attempt_is_dead_with_its_reason() {
    let last = Delivery {
        attempts: 2,
        ..delivery(DeliveryState::Sent)
    };
    let dead = Outcome::Dead {
        attempts: 3,
        error: "no".into(),
    };
    assert_eq!(answer(&last, 2, &Failed("no".into())), dead);
    assert!(matches!(
        apply(&last, DeliveryEvent::PassedBy(2)),
        Outcome::Dead { .. }
    ));
}

#[test]
fn later_waits_at_least_the_step_after_three_in_a_row() {
    let mut it = delivery(DeliveryState::Sent);
    let at_once = Later(Duration::ZERO);
    for laters in 1..=3 {
        assert_eq!(answer(&it, 2, &at_once), again(0, 1, laters, 0, None));
        it.laters = laters;
    }
    assert_eq!(answer(&it, 2, &at_once), again(8, 1, 4, 0, None));
    assert_eq!(
        answer(&it, 2, &Later(Duration::from_secs(60))),
        again(60, 1, 4, 0, None)
    );
}

#[test]
fn the_fifth_stream_that_ends_over_a_delivery_counts_as_failed() {
    let fourth = Delivery {
        stream_ends: 3,
        ..delivery(DeliveryState::Sent)
    };
    let ended = DeliveryEvent::StreamEnded {
        generation: 2,
        counts: true,
    };
    assert_eq!(apply(&fourth, ended.clone()), again(0, 1, 0, 4, None));
    let fifth = Delivery {
        stream_ends: 4,
        ..delivery(DeliveryState::Sent)
    };
    let outcome = apply(&fifth, ended);
    assert!(
        matches!(
            outcome,
            Outcome::Again {
                attempts: 2,
                stream_ends: 5,
                error: Some(_),
                ..
            }
        ),
        "{outcome:?}"
    );
}

#[test]
fn the_third_channel_that_is_closed_over_a_delivery_is_its_death() {
    let second = Delivery {
        stream_ends: 1,
        ..delivery(DeliveryState::Pending)
    };
    let closed = DeliveryEvent::Suspected("501 FRAME_ERROR");
    assert_eq!(
        apply(&second, closed.clone()),
        again(1, 1, 0, 2, Some("501 FRAME_ERROR"))
    );
    let third = Delivery {
        stream_ends: 2,
        ..second
    };
    let dead = Outcome::Dead {
        attempts: 1,
        error: "the broker closed 3 channels over it: 501 FRAME_ERROR".into(),
    };
    assert_eq!(apply(&third, closed), dead);
}

#[test]
fn what_was_never_leased_or_was_counted_since_is_not_given_back() {
    let pending = || delivery(DeliveryState::Pending);
    let never = Delivery {
        generation: 0,
        answered_generation: 0,
        ..pending()
    };
    let counted = Delivery {
        answered_generation: 2,
        stream_ends: 2,
        ..pending()
    };
    for it in [never, counted] {
        for event in [
            DeliveryEvent::Untried,
            DeliveryEvent::Suspected("504"),
            DeliveryEvent::Refused {
                reason: "full",
                retry_after: Duration::ZERO,
            },
        ] {
            assert_eq!(apply(&it, event), Outcome::Stale);
        }
    }
}

#[test]
fn a_send_that_was_passed_by_long_ago_is_due_at_once() {
    let old = Delivery {
        attempts: 0,
        sent_at: Some(NOW.before(Duration::from_secs(45))),
        ..delivery(DeliveryState::Sent)
    };
    let outcome = apply(&old, DeliveryEvent::PassedBy(2));
    assert!(
        matches!(
            outcome,
            Outcome::Again {
                due_at: NOW,
                attempts: 1,
                ..
            }
        ),
        "{outcome:?}"
    );
}

proptest::proptest! {
    /// Against a small model: attempts never go down or beyond the limit, CONSUMED stays,
    /// and nothing but DEAD or a skip ends a delivery that nobody consumed.
    #[test]
    fn random_events_keep_to_the_model(steps in proptest::collection::vec((0u8..11, 0u32..6), 0..80)) {
        let policy = policy();
        let mut it = Delivery { attempts: 0, generation: 0, answered_generation: 0, ..delivery(DeliveryState::Pending) };
        let mut consumed = false;
        for (event, generation) in steps {
            if event == 0 && it.state == DeliveryState::Pending {
                it.generation += 1;
                it.state = DeliveryState::Sent;
                continue;
            }
            let (failed, rejected, later) = (Failed("f".into()), Rejected("r".into()), Later(Duration::ZERO));
            let event = match event {
                1 => DeliveryEvent::Answer(generation, &AnswerKind::Consumed),
                2 => DeliveryEvent::Answer(generation, &failed),
                3 => DeliveryEvent::Answer(generation, &rejected),
                4 => DeliveryEvent::Answer(generation, &later),
                5 => DeliveryEvent::PassedBy(generation),
                6 => DeliveryEvent::StreamEnded { generation, counts: true },
                7 => DeliveryEvent::Untried,
                8 => DeliveryEvent::Suspected("closed"),
                9 => DeliveryEvent::Refused { reason: "full", retry_after: Duration::ZERO },
                _ => DeliveryEvent::Skip,
            };
            let before = it.clone();
            match it.apply(&event, &policy, NOW, Chance::NONE) {
                Outcome::Again { attempts, laters, stream_ends, .. } => {
                    it = Delivery { state: DeliveryState::Pending, attempts, laters, stream_ends,
                        answered_generation: it.generation, ..it };
                    proptest::prop_assert!(attempts < 3);
                }
                Outcome::Consumed => { it.state = DeliveryState::Consumed; consumed = true; }
                Outcome::Dead { attempts, .. } => { it.state = DeliveryState::Dead; it.attempts = attempts; }
                Outcome::Skipped => it.state = DeliveryState::Skipped,
                Outcome::AlreadySo | Outcome::Stale => {}
            }
            proptest::prop_assert!(it.attempts >= before.attempts);
            proptest::prop_assert!(it.attempts - before.attempts <= 1);
            proptest::prop_assert_eq!(it.state == DeliveryState::Consumed, consumed);
        }
    }
}
