use super::*;

#[test]
fn cursors_survive_the_wire_and_foreign_ones_are_malformed() {
    let cursor = (
        "accounting".to_owned(),
        MessageId::from_bytes(&[1; 16]).unwrap(),
    );
    let wire = write_delivery_cursor(&cursor);
    assert_eq!(delivery_cursor(&wire), Ok(Some(cursor)));
    assert_eq!(delivery_cursor(&[]), Ok(None));
    for foreign in [&[1u8][..], &[0; 20], &[1; 16], &[0xff; 20]] {
        delivery_cursor(foreign).unwrap_err();
    }
    assert_eq!(message_cursor(&[]), Ok(None));
    message_cursor(&[1; 17]).unwrap_err();
}

#[test]
fn a_list_of_messages_needs_a_state_or_a_flag() {
    let prepared = proto::MessageState::Prepared as i32;
    assert_eq!(
        message_filter(prepared, ""),
        Ok(MessageFilter::State(MessageState::Prepared))
    );
    assert_eq!(message_filter(0, "conflict"), Ok(MessageFilter::Conflict));
    for (state, flag) in [(0, ""), (prepared, "conflict"), (0, "lost"), (99, "")] {
        message_filter(state, flag).unwrap_err();
    }
}
