use super::*;

fn an_id() -> Vec<u8> {
    uuid::Uuid::from_u128(1).as_bytes().to_vec()
}

fn an_answer(kind: proto::AnswerKind) -> proto::Answer {
    proto::Answer {
        message_id: an_id(),
        generation: 1,
        sent_at: 5,
        kind: kind as i32,
        reason: String::new(),
        later_ms: 0,
    }
}

fn read(answer: proto::Answer) -> Result<Option<Answer>, Invalid> {
    let mut list = answers("accounting".into(), vec![answer]);
    list.answers.remove(0)
}

#[test]
fn malformed_messages_are_read_one_by_one() {
    let good = proto::NewMessage {
        id: an_id(),
        ..proto::NewMessage::default()
    };
    let nil = proto::NewMessage {
        id: vec![0; 16],
        ..proto::NewMessage::default()
    };
    let short = proto::NewMessage {
        id: vec![1; 15],
        ..proto::NewMessage::default()
    };
    let odd_fence = proto::NewMessage {
        fence: vec![1],
        ..good.clone()
    };
    let list = submission("payment".into(), vec![nil, good, short, odd_fence]);
    let fields: Vec<_> = list
        .messages
        .iter()
        .map(|item| item.as_ref().err().map(|invalid| invalid.field.as_str()))
        .collect();
    assert_eq!(fields, [Some("id"), None, Some("id"), Some("fence")]);
}

#[test]
fn an_answer_with_an_impossible_id_has_no_delivery() {
    for id in [vec![], vec![1; 15], vec![1; 17], vec![0; 16]] {
        let answer = proto::Answer {
            message_id: id,
            ..an_answer(proto::AnswerKind::Consumed)
        };
        assert_eq!(read(answer), Ok(None));
    }
}

#[test]
fn later_is_0_to_7_days_and_says_which_answer_was_not() {
    let with = |later_ms| proto::Answer {
        later_ms,
        ..an_answer(proto::AnswerKind::Later)
    };
    for ms in [0, 604_800_000] {
        let kind = read(with(ms)).unwrap().unwrap().kind;
        assert_eq!(kind, AnswerKind::Later(Duration::from_millis(ms as u64)));
    }
    for ms in [-1, 604_800_001, i64::MIN, i64::MAX] {
        let invalid = read(with(ms)).unwrap_err();
        assert_eq!(invalid.field, "answers[0].later_ms");
        assert!(invalid.reason.contains("604800000"), "{}", invalid.reason);
    }
}

#[test]
fn an_unknown_kind_of_answer_is_malformed() {
    for kind in [0, 5, -1] {
        let answer = proto::Answer {
            kind,
            ..an_answer(proto::AnswerKind::Consumed)
        };
        assert_eq!(read(answer).unwrap_err().field, "answers[0].kind");
    }
}

#[test]
fn a_long_reason_is_cut_at_a_characters_end() {
    let answer = proto::Answer {
        reason: "ä".repeat(501) + "\0",
        ..an_answer(proto::AnswerKind::Failed)
    };
    let kind = read(answer).unwrap().unwrap().kind;
    assert_eq!(kind, AnswerKind::Failed("ä".repeat(500)));
    let answer = proto::Answer {
        reason: format!("a{}\0", "ä".repeat(10)),
        ..an_answer(proto::AnswerKind::Rejected)
    };
    let kind = read(answer).unwrap().unwrap().kind;
    assert_eq!(kind, AnswerKind::Rejected(format!("a{}?", "ä".repeat(10))));
}

#[test]
fn an_answer_that_does_not_know_when_it_was_sent_says_so() {
    for sent_at in [0, -7] {
        let answer = proto::Answer {
            sent_at,
            ..an_answer(proto::AnswerKind::Consumed)
        };
        assert_eq!(read(answer).unwrap().unwrap().sent_at, None);
    }
}
