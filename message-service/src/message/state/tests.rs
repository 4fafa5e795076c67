use super::MessageEvent::*;
use super::MessageState::*;
use super::*;

const EVENTS: [MessageEvent; 4] = [Prepare, Confirm, Cancel, Publish];

#[test]
fn every_pair_of_state_and_event_is_decided() {
    let table = [
        (Prepared, Prepare, Ok(Effect::AlreadySo)),
        (Prepared, Confirm, Ok(Effect::Moves(Confirmed))),
        (Prepared, Cancel, Ok(Effect::Moves(Cancelled))),
        (Prepared, Publish, Ok(Effect::Moves(Confirmed))),
        (
            Confirmed,
            Prepare,
            Err(WrongState {
                event: Prepare,
                state: Confirmed,
            }),
        ),
        (Confirmed, Confirm, Ok(Effect::AlreadySo)),
        (
            Confirmed,
            Cancel,
            Err(WrongState {
                event: Cancel,
                state: Confirmed,
            }),
        ),
        (Confirmed, Publish, Ok(Effect::AlreadySo)),
        (
            Cancelled,
            Prepare,
            Err(WrongState {
                event: Prepare,
                state: Cancelled,
            }),
        ),
        (
            Cancelled,
            Confirm,
            Err(WrongState {
                event: Confirm,
                state: Cancelled,
            }),
        ),
        (Cancelled, Cancel, Ok(Effect::AlreadySo)),
        (
            Cancelled,
            Publish,
            Err(WrongState {
                event: Publish,
                state: Cancelled,
            }),
        ),
    ];
    assert_eq!(table.len(), MessageState::ALL.len() * EVENTS.len());
    for (state, event, wanted) in table {
        assert_eq!(state.apply(event), wanted, "{event} of {state}");
    }
}

#[test]
fn only_a_contradiction_of_a_decision_is_a_conflict() {
    for state in MessageState::ALL {
        for event in EVENTS {
            let conflict = state
                .apply(event)
                .err()
                .is_some_and(|refused| refused.is_conflict());
            let wanted = matches!(
                (state, event),
                (Cancelled, Confirm | Publish) | (Confirmed, Cancel)
            );
            assert_eq!(conflict, wanted, "{event} of {state}");
        }
    }
}

#[test]
fn a_refusal_names_what_was_asked_and_what_is() {
    let refused = Cancelled.apply(Confirm).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "cannot confirm a message that is CANCELLED"
    );
}

#[test]
fn words_are_read_back() {
    for state in MessageState::ALL {
        assert_eq!(MessageState::from_word(state.as_str()), Some(state));
    }
    assert_eq!(MessageState::from_word("ARCHIVED"), None);
}

proptest::proptest! {
    /// Whatever comes in whatever order, the first decision stays.
    #[test]
    fn the_first_decision_is_final(events in proptest::collection::vec(0..EVENTS.len(), 0..40)) {
        let mut state = Prepared;
        let mut first = None;
        for event in events.into_iter().map(|index| EVENTS[index]) {
            if let Ok(Effect::Moves(next)) = state.apply(event) {
                proptest::prop_assert_eq!(first, None);
                first = Some(next);
                state = next;
            }
        }
        proptest::prop_assert_eq!(state, first.unwrap_or(Prepared));
    }
}
