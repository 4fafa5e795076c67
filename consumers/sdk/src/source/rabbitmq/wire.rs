//! The contract on the wire: how a delivery is read and how answers are written.
//!
//! Whoever reads takes what the contract promises and passes over what it does not know.

use std::collections::VecDeque;

use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde::Serialize;
use uuid::Uuid;

use crate::message::{Answer, Answered, Delivered};
use crate::source::{MAX_LATER, cut};

/// How many answers one message carries at most.
const MAX_ANSWERS: usize = 500;
/// How large a message of answers is at most; a single answer is always smaller.
const MAX_ANSWERS_BYTES: usize = 1024 * 1024;

const SUBSCRIPTION: &str = "handfast-subscription";
const KEY: &str = "handfast-key";
const GENERATION: &str = "handfast-generation";
const SENT_AT: &str = "handfast-sent-at";
const FIRST_SENT_AT: &str = "handfast-first-sent-at";
/// RabbitMQ's own: how often this message came back.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// Reads a delivery for this subscription. The reason of a refusal repeats nothing of it.
pub(super) fn read(delivery: Delivery, subscription: &str) -> Result<Delivered, String> {
    let properties = delivery.properties;
    let text =
        |property: &Option<ShortString>| property.as_ref().map(|text| text.as_str().to_owned());
    let none = FieldTable::default();
    let table = properties.headers().as_ref().unwrap_or(&none);
    let message_id = properties
        .message_id()
        .as_ref()
        .and_then(|id| Uuid::try_parse(id.as_str()).ok())
        .ok_or("the message id is not a UUID")?;
    match longstr(table, SUBSCRIPTION) {
        Some(named) if named == subscription => {}
        Some(_) => return Err("it is for another subscription".to_owned()),
        None => return Err(missing(SUBSCRIPTION)),
    }
    let integer_of = |name| integer(table, name).ok_or_else(|| missing(name));
    let generation = u32::try_from(integer_of(GENERATION)?)
        .map_err(|_| format!("{GENERATION} is out of range"))?;
    Ok(Delivered {
        message_id,
        subscription: subscription.to_owned(),
        topic: text(properties.kind()).ok_or("it has no type, which is its topic")?,
        producer: text(properties.app_id()).unwrap_or_default(),
        key: longstr(table, KEY),
        content_type: text(properties.content_type()).unwrap_or_default(),
        headers: producers_own(table),
        generation,
        sent_at: integer_of(SENT_AT)?,
        first_sent_at: integer_of(FIRST_SENT_AT)?,
        alone: delivery.redelivered && integer(table, DELIVERY_COUNT).is_some_and(|n| n > 0),
        payload: delivery.data.into(),
    })
}

fn missing(header: &str) -> String {
    format!("its header {header} is missing or of another type")
}

fn producers_own(table: &FieldTable) -> Vec<(String, String)> {
    table
        .inner()
        .keys()
        .map(ShortString::as_str)
        .filter(|name| !name.starts_with("handfast-") && !name.starts_with("x-"))
        .filter_map(|name| Some((name.to_owned(), longstr(table, name)?)))
        .collect()
}

fn longstr(table: &FieldTable, name: &str) -> Option<String> {
    match table.inner().get(name)? {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        _ => None,
    }
}

/// Any integer type will do.
fn integer(table: &FieldTable, name: &str) -> Option<i64> {
    match *table.inner().get(name)? {
        AMQPValue::ShortShortInt(n) => Some(n.into()),
        AMQPValue::ShortShortUInt(n) => Some(n.into()),
        AMQPValue::ShortInt(n) => Some(n.into()),
        AMQPValue::ShortUInt(n) => Some(n.into()),
        AMQPValue::LongInt(n) => Some(n.into()),
        AMQPValue::LongUInt(n) => Some(n.into()),
        AMQPValue::LongLongInt(n) => Some(n),
        AMQPValue::Timestamp(n) => i64::try_from(n).ok(),
        _ => None,
    }
}

#[derive(Serialize)]
struct Word<'a> {
    message_id: String,
    generation: u32,
    sent_at: i64,
    answer: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after_ms: Option<u64>,
}

/// Writes a message with the first of these answers, as many as it may carry, and says how
/// many those are.
pub(super) fn write(
    subscription: &str,
    answers: &VecDeque<Answered>,
) -> Result<(Vec<u8>, usize), serde_json::Error> {
    let mut body = b"{\"subscription\":".to_vec();
    serde_json::to_writer(&mut body, subscription)?;
    body.extend_from_slice(b",\"answers\":[");
    let mut count = 0;
    for answered in answers.iter().take(MAX_ANSWERS) {
        let before = body.len();
        if count > 0 {
            body.push(b',');
        }
        serde_json::to_writer(&mut body, &Word::from(answered))?;
        if body.len() + b"]}".len() > MAX_ANSWERS_BYTES {
            body.truncate(before);
            break;
        }
        count += 1;
    }
    body.extend_from_slice(b"]}");
    Ok((body, count))
}

impl<'a> From<&'a Answered> for Word<'a> {
    fn from(answered: &'a Answered) -> Self {
        let (answer, reason, after) = match &answered.answer {
            Answer::Consumed => ("CONSUMED", None, None),
            Answer::Failed(reason) => ("FAILED", Some(cut(reason)), None),
            Answer::Later(after) => ("LATER", None, Some(*after)),
            Answer::Rejected(reason) => ("REJECTED", Some(cut(reason)), None),
        };
        Self {
            message_id: answered.message_id.to_string(),
            generation: answered.generation,
            sent_at: answered.sent_at,
            answer,
            reason,
            // At most 7 days, which fits.
            after_ms: after.map(|after| after.min(MAX_LATER).as_millis() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lapin::BasicProperties;
    use lapin::types::LongString;

    use super::*;

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(LongString::from(text))
    }

    fn put(headers: &mut FieldTable, name: &str, value: AMQPValue) {
        headers.insert(name.into(), value);
    }

    fn delivery(change: impl FnOnce(&mut BasicProperties, &mut FieldTable)) -> Delivery {
        let mut delivery = Delivery::mock(
            7,
            "".into(),
            "handfast.accounting".into(),
            true,
            b"paid".to_vec(),
        );
        let mut properties = BasicProperties::default()
            .with_message_id(Uuid::from_u128(1).to_string().into())
            .with_type("payment.completed".into())
            .with_app_id("payment".into())
            .with_content_type("text/plain".into());
        let mut headers = FieldTable::default();
        headers.insert(SUBSCRIPTION.into(), text("accounting"));
        headers.insert(KEY.into(), text("order 42"));
        headers.insert(GENERATION.into(), AMQPValue::LongInt(3));
        headers.insert(SENT_AT.into(), AMQPValue::LongLongInt(200));
        headers.insert(FIRST_SENT_AT.into(), AMQPValue::LongLongInt(100));
        headers.insert("traceparent".into(), text("00-1-2-01"));
        change(&mut properties, &mut headers);
        delivery.properties = properties.with_headers(headers);
        delivery
    }

    #[test]
    fn a_delivery_is_read_by_the_contract() {
        let read = read(delivery(|_, _| {}), "accounting").unwrap();
        let expected = Delivered {
            message_id: Uuid::from_u128(1),
            subscription: "accounting".to_owned(),
            topic: "payment.completed".to_owned(),
            producer: "payment".to_owned(),
            key: Some("order 42".to_owned()),
            content_type: "text/plain".to_owned(),
            headers: vec![("traceparent".to_owned(), "00-1-2-01".to_owned())],
            payload: "paid".into(),
            generation: 3,
            sent_at: 200,
            first_sent_at: 100,
            alone: false,
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn every_integer_type_is_understood() {
        for number in [
            AMQPValue::ShortShortInt(3),
            AMQPValue::ShortShortUInt(3),
            AMQPValue::ShortInt(3),
            AMQPValue::ShortUInt(3),
            AMQPValue::LongUInt(3),
            AMQPValue::LongLongInt(3),
            AMQPValue::Timestamp(3),
        ] {
            let delivery = delivery(|_, headers| put(headers, GENERATION, number));
            assert_eq!(read(delivery, "accounting").unwrap().generation, 3);
        }
    }

    #[test]
    fn what_came_back_unanswered_is_alone() {
        let counted = |count| {
            let delivery = delivery(|_, headers| {
                headers.insert(DELIVERY_COUNT.into(), AMQPValue::LongLongInt(count));
            });
            read(delivery, "accounting").unwrap().alone
        };
        assert!(counted(1));
        assert!(!counted(0));
        let mut first = delivery(|_, headers| {
            headers.insert(DELIVERY_COUNT.into(), AMQPValue::LongLongInt(1));
        });
        first.redelivered = false;
        assert!(!read(first, "accounting").unwrap().alone);
    }

    #[test]
    fn a_message_that_does_not_follow_the_contract_is_refused_with_a_reason() {
        let cases: [(Delivery, &str); 6] = [
            (
                delivery(|p, _| *p = p.clone().with_message_id("17".into())),
                "not a UUID",
            ),
            (
                delivery(|p, _| *p = BasicProperties::default()),
                "not a UUID",
            ),
            (
                delivery(|_, h| *h = FieldTable::default()),
                "handfast-subscription is missing",
            ),
            (
                delivery(|_, h| put(h, SUBSCRIPTION, text("points"))),
                "another subscription",
            ),
            (
                delivery(|_, h| put(h, GENERATION, text("3"))),
                "handfast-generation is missing",
            ),
            (
                delivery(|_, h| put(h, GENERATION, AMQPValue::LongInt(-1))),
                "out of range",
            ),
        ];
        for (delivery, reason) in cases {
            let refused = read(delivery, "accounting").unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
    }

    fn answered(id: u128, answer: Answer) -> Answered {
        Answered {
            message_id: Uuid::from_u128(id),
            generation: 2,
            sent_at: 200,
            answer,
        }
    }

    #[test]
    fn answers_are_written_by_the_contract() {
        let answers = VecDeque::from([
            answered(1, Answer::Consumed),
            answered(2, Answer::failed("no \"money\"")),
            answered(3, Answer::Later(Duration::MAX)),
            answered(4, Answer::rejected("é".repeat(600))),
        ]);
        let (body, count) = write("accounting", &answers).unwrap();
        assert_eq!(count, 4);
        let message: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let id = |n: u128| Uuid::from_u128(n).hyphenated().to_string();
        let expected = serde_json::json!({
            "subscription": "accounting",
            "answers": [
                {"message_id": id(1), "generation": 2, "sent_at": 200, "answer": "CONSUMED"},
                {"message_id": id(2), "generation": 2, "sent_at": 200, "answer": "FAILED",
                 "reason": "no \"money\""},
                {"message_id": id(3), "generation": 2, "sent_at": 200, "answer": "LATER",
                 "after_ms": 604_800_000},
                {"message_id": id(4), "generation": 2, "sent_at": 200, "answer": "REJECTED",
                 "reason": "é".repeat(500)},
            ],
        });
        assert_eq!(message, expected);
    }

    #[test]
    fn a_message_of_answers_is_bounded_by_count_and_bytes() {
        let small: VecDeque<_> = (0..501).map(|n| answered(n, Answer::Consumed)).collect();
        assert_eq!(write("accounting", &small).unwrap().1, 500);
        // A control character takes six bytes in JSON.
        let long = Answer::failed("\u{1}".repeat(2_000));
        let large: VecDeque<_> = (0..500).map(|n| answered(n, long.clone())).collect();
        let (body, count) = write("accounting", &large).unwrap();
        assert!((100..500).contains(&count), "{count}");
        assert!(body.len() <= MAX_ANSWERS_BYTES);
        serde_json::from_slice::<serde_json::Value>(&body).unwrap();
    }
}
