//! The wire contract, as `docs/guide/wire.md` has it: a delivery as an AMQP message, and an
//! answer out of one.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde::Deserialize;

use crate::message::limits;
use crate::message::{Answer, AnswerKind, MessageId, Timestamp};
use crate::store::DeliveryClaim;

/// The largest message of answers, in bytes.
const ANSWERS_BYTES: usize = 1024 * 1024;
/// The most answers of one message.
const ANSWERS: usize = 500;
/// Persistent: on disk before the publisher confirm.
const PERSISTENT: u8 = 2;

/// The properties and headers of a delivery.
pub(super) fn properties(subscription: &str, claim: &DeliveryClaim) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in &claim.headers {
        headers.insert(name.as_str().into(), text(value));
    }
    // Ours come last, so that they win; prepare refuses a producer's header of such a name.
    headers.insert("handfast-subscription".into(), text(subscription));
    if let Some(key) = &claim.key {
        headers.insert("handfast-key".into(), text(key));
    }
    let generation = i32::try_from(claim.generation).unwrap_or(i32::MAX);
    headers.insert("handfast-generation".into(), AMQPValue::LongInt(generation));
    for (name, at) in [
        ("handfast-sent-at", claim.sent_at),
        ("handfast-first-sent-at", claim.first_sent_at),
    ] {
        headers.insert(name.into(), AMQPValue::LongLongInt(at.as_micros()));
    }
    BasicProperties::default()
        .with_message_id(claim.id.to_string().into())
        .with_type(claim.topic.as_str().into())
        .with_app_id(claim.producer.as_str().into())
        .with_content_type(claim.content_type.as_str().into())
        .with_delivery_mode(PERSISTENT)
        .with_headers(headers)
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// The answers of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answers {
    pub(super) subscription: String,
    /// Those that can be read.
    pub(super) answers: Vec<Answer>,
    /// How many cannot.
    pub(super) unreadable: u64,
}

#[derive(Deserialize)]
struct Body {
    subscription: String,
    answers: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Item {
    message_id: String,
    generation: u32,
    #[serde(default)]
    sent_at: i64,
    answer: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    after_ms: u64,
}

/// Reads a message of answers. One that cannot be read at all is an error; an item that cannot
/// is counted, and the others are good.
pub(super) fn answers(body: &[u8]) -> Result<Answers, String> {
    if body.len() > ANSWERS_BYTES {
        return Err(format!(
            "{} bytes are over the limit of {ANSWERS_BYTES} bytes",
            body.len()
        ));
    }
    let body: Body = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if body.answers.len() > ANSWERS {
        return Err(format!(
            "{} answers are over the limit of {ANSWERS}",
            body.answers.len()
        ));
    }
    let all = body.answers.len();
    let answers: Vec<_> = body.answers.into_iter().filter_map(answer).collect();
    Ok(Answers {
        subscription: body.subscription,
        unreadable: (all - answers.len()) as u64,
        answers,
    })
}

fn answer(item: serde_json::Value) -> Option<Answer> {
    let item: Item = serde_json::from_value(item).ok()?;
    let kind = match item.answer.as_str() {
        "CONSUMED" => AnswerKind::Consumed,
        "FAILED" => AnswerKind::Failed(limits::reason(item.reason)),
        "LATER" => {
            let after = Duration::from_millis(item.after_ms);
            AnswerKind::Later((after <= limits::LATER).then_some(after)?)
        }
        "REJECTED" => AnswerKind::Rejected(limits::reason(item.reason)),
        _ => return None,
    };
    let id: uuid::Uuid = item.message_id.parse().ok()?;
    Some(Answer {
        id: MessageId::from_bytes(id.as_bytes())?,
        generation: item.generation,
        sent_at: (item.sent_at > 0).then(|| Timestamp::from_micros(item.sent_at)),
        kind,
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn claim() -> DeliveryClaim {
        DeliveryClaim {
            id: Uuid::from_u128(1).into(),
            generation: 3,
            token: Uuid::from_u128(9),
            producer: "payment".into(),
            topic: "payment.completed".into(),
            key: Some("order 42".into()),
            content_type: "application/json".into(),
            headers: vec![("traceparent".into(), "00-a".into())],
            payload: b"{}".to_vec(),
            sent_at: Timestamp::from_micros(20),
            first_sent_at: Timestamp::from_micros(10),
        }
    }

    #[test]
    fn a_delivery_carries_what_the_contract_says() {
        let properties = properties("accounting", &claim());
        let word = |value: &Option<lapin::types::ShortString>| value.clone().unwrap().to_string();
        assert_eq!(
            word(properties.message_id()),
            "00000000-0000-0000-0000-000000000001"
        );
        assert_eq!(word(properties.kind()), "payment.completed");
        assert_eq!(word(properties.app_id()), "payment");
        assert_eq!(word(properties.content_type()), "application/json");
        assert_eq!(*properties.delivery_mode(), Some(2));
        let headers = properties.headers().clone().unwrap();
        let header = |name: &str| headers.inner().get(name).cloned().unwrap();
        assert_eq!(header("handfast-subscription"), text("accounting"));
        assert_eq!(header("handfast-key"), text("order 42"));
        assert_eq!(header("handfast-generation"), AMQPValue::LongInt(3));
        assert_eq!(header("handfast-sent-at"), AMQPValue::LongLongInt(20));
        assert_eq!(header("handfast-first-sent-at"), AMQPValue::LongLongInt(10));
        assert_eq!(header("traceparent"), text("00-a"));
        assert_eq!(headers.inner().len(), 6);
    }

    #[test]
    fn answers_of_every_kind_are_read() {
        let id = Uuid::from_u128(1);
        let body = format!(
            r#"{{"subscription":"accounting","unknown":1,"answers":[
              {{"message_id":"{id}","generation":1,"sent_at":5,"answer":"CONSUMED"}},
              {{"message_id":"{id}","generation":1,"answer":"FAILED","reason":"no"}},
              {{"message_id":"{id}","generation":2,"answer":"LATER","after_ms":1500}},
              {{"message_id":"{id}","generation":2,"answer":"REJECTED","reason":"never"}}]}}"#
        );
        let read = answers(body.as_bytes()).unwrap();
        assert_eq!(read.subscription, "accounting");
        assert_eq!(read.unreadable, 0);
        let kinds: Vec<_> = read.answers.iter().map(|answer| &answer.kind).collect();
        assert_eq!(
            kinds,
            [
                &AnswerKind::Consumed,
                &AnswerKind::Failed("no".into()),
                &AnswerKind::Later(Duration::from_millis(1500)),
                &AnswerKind::Rejected("never".into()),
            ]
        );
        assert_eq!(read.answers[0].sent_at, Some(Timestamp::from_micros(5)));
        assert_eq!(read.answers[1].sent_at, None);
    }

    #[test]
    fn a_broken_answer_does_not_spoil_its_neighbours() {
        let id = Uuid::from_u128(1);
        let body = format!(
            r#"{{"subscription":"s","answers":[
              {{"message_id":"x","generation":1,"answer":"CONSUMED"}},
              {{"message_id":"{id}","generation":-1,"answer":"CONSUMED"}},
              {{"message_id":"{id}","generation":1,"answer":"MAYBE"}},
              {{"message_id":"{id}","generation":1,"answer":"LATER","after_ms":999999999999}},
              {{"message_id":"{id}","generation":1,"answer":"CONSUMED"}}, 7]}}"#
        );
        let read = answers(body.as_bytes()).unwrap();
        assert_eq!((read.answers.len(), read.unreadable), (1, 5));
    }

    #[test]
    fn what_is_no_message_of_answers_is_refused() {
        let many = format!(
            r#"{{"subscription":"s","answers":[{}1]}}"#,
            "1,".repeat(ANSWERS)
        );
        for body in ["", "[]", "{\"answers\":[]}", "\u{0}", many.as_str()] {
            answers(body.as_bytes()).unwrap_err();
        }
        answers(&vec![b' '; ANSWERS_BYTES + 1]).unwrap_err();
    }
}
