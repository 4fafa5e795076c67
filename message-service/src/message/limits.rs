//! How large and how odd a message may be.
//!
//! The limits keep every message below what a broker can carry: header tables beyond a frame
//! close an AMQP connection, names over 255 bytes cannot be written at all, and the names `CC`
//! and `BCC` change where a message goes.

use std::time::Duration;

use super::{NewMessage, Timestamp};

/// The most a payload limit can be set to, in bytes.
pub const HARD_PAYLOAD_BYTES: usize = 1024 * 1024;
/// Topic, subscription, producer and content type, in bytes.
pub const NAME_BYTES: usize = 100;
/// A key, in bytes.
pub const KEY_BYTES: usize = 255;
/// How many headers.
pub const HEADERS: usize = 64;
/// The name of a header, in bytes.
pub const HEADER_NAME_BYTES: usize = 64;
/// The value of a header, in bytes.
pub const HEADER_VALUE_BYTES: usize = 4 * 1024;
/// Names and values of all headers together, in bytes.
pub const HEADERS_BYTES: usize = 32 * 1024;
/// How far ahead `deliver_after` may lie.
pub const DELIVER_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
/// Bytes of a reason that a consumer gives with an answer.
pub const REASON_BYTES: usize = 1_000;
/// How far ahead an answer LATER may lie.
pub const LATER: Duration = Duration::from_secs(7 * 24 * 3600);

/// The limits that an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest payload, in bytes; at most [`HARD_PAYLOAD_BYTES`].
    pub payload_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload_bytes: 256 * 1024,
        }
    }
}

/// A field that was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// The path in the item, such as `payload` or `headers[3].name`.
    pub field: String,
    /// Why, with the size and the limit where they are the reason.
    pub reason: String,
}

impl Invalid {
    /// A field that is wrong for another reason than its size.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A field that is too large.
    pub fn too_large(field: impl Into<String>, size: usize, limit: usize, unit: &str) -> Self {
        Self::new(
            field,
            format!("size {size} {unit} is over the limit of {limit} {unit}"),
        )
    }
}

impl Limits {
    /// Checks everything about a message that needs no store.
    pub fn check(&self, message: &NewMessage, now: Timestamp) -> Result<(), Invalid> {
        name("topic", &message.topic)?;
        if let Some(key) = &message.key {
            text("key", key, KEY_BYTES)?;
            if key.is_empty() {
                return Err(Invalid::new("key", "is empty; leave it out instead"));
            }
        }
        text("content_type", &message.content_type, NAME_BYTES)?;
        if message.payload.len() > self.payload_bytes {
            return Err(Invalid::too_large(
                "payload",
                message.payload.len(),
                self.payload_bytes,
                "bytes",
            ));
        }
        headers(&message.headers)?;
        if let Some(at) = message.deliver_after {
            let ahead = at.since(now);
            if ahead > DELIVER_AFTER {
                return Err(Invalid::too_large(
                    "deliver_after",
                    usize::try_from(ahead.as_secs()).unwrap_or(usize::MAX),
                    DELIVER_AFTER.as_secs() as usize,
                    "seconds ahead",
                ));
            }
        }
        Ok(())
    }
}

/// Cuts a consumer's reason to [`REASON_BYTES`] at a character's end, so that the rest is still
/// text. NUL, which not every store can keep, becomes visible instead.
pub fn reason(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON_BYTES));
    if reason.contains('\0') {
        reason = reason.replace('\0', "?");
    }
    reason
}

/// Checks a name: 1 to [`NAME_BYTES`] bytes, no control character.
pub fn name(field: &str, value: &str) -> Result<(), Invalid> {
    if value.is_empty() {
        return Err(Invalid::new(field, "is empty"));
    }
    text(field, value, NAME_BYTES)
}

fn text(field: &str, value: &str, limit: usize) -> Result<(), Invalid> {
    if value.len() > limit {
        return Err(Invalid::too_large(field, value.len(), limit, "bytes"));
    }
    if value.chars().any(char::is_control) {
        return Err(Invalid::new(field, "has a control character"));
    }
    Ok(())
}

fn headers(headers: &[(String, String)]) -> Result<(), Invalid> {
    if headers.len() > HEADERS {
        return Err(Invalid::too_large(
            "headers",
            headers.len(),
            HEADERS,
            "headers",
        ));
    }
    let mut together = 0;
    for (index, (name, value)) in headers.iter().enumerate() {
        let field = format!("headers[{index}].name");
        if name.is_empty() {
            return Err(Invalid::new(field, "is empty"));
        }
        text(&field, name, HEADER_NAME_BYTES)?;
        if is_reserved(name) {
            return Err(Invalid::new(field, format!("`{name}` is reserved")));
        }
        let field = format!("headers[{index}].value");
        if value.len() > HEADER_VALUE_BYTES {
            return Err(Invalid::too_large(
                field,
                value.len(),
                HEADER_VALUE_BYTES,
                "bytes",
            ));
        }
        if value.contains('\0') {
            return Err(Invalid::new(field, "has a NUL character"));
        }
        if headers[..index].iter().any(|(other, _)| other == name) {
            return Err(Invalid::new(
                format!("headers[{index}].name"),
                format!("`{name}` is there twice"),
            ));
        }
        together += name.len() + value.len();
    }
    if together > HEADERS_BYTES {
        return Err(Invalid::too_large(
            "headers",
            together,
            HEADERS_BYTES,
            "bytes",
        ));
    }
    Ok(())
}

/// `CC` and `BCC` route in RabbitMQ; `x-*` is the broker's, `handfast-*` is ours.
fn is_reserved(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name == "cc" || name == "bcc" || name.starts_with("x-") || name.starts_with("handfast-")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::message::MessageId;

    pub(crate) fn a_message() -> NewMessage {
        NewMessage {
            id: MessageId::from(uuid::Uuid::from_u128(1)),
            producer: "payment".into(),
            topic: "payment.completed".into(),
            key: Some("order 42".into()),
            content_type: "application/json".into(),
            headers: Vec::new(),
            payload: b"{}".to_vec(),
            deliver_after: None,
            fence: None,
        }
    }

    fn refused(message: &NewMessage) -> Option<String> {
        Limits::default()
            .check(message, Timestamp::default())
            .err()
            .map(|invalid| invalid.field)
    }

    fn with_headers(headers: Vec<(String, String)>) -> NewMessage {
        NewMessage {
            headers,
            ..a_message()
        }
    }

    #[test]
    fn what_fits_exactly_is_accepted_and_one_more_is_not() {
        let base = a_message();
        for extra in [0, 1] {
            let wanted = |field: &str| (extra == 1).then(|| field.to_owned());
            let cases = [
                (
                    NewMessage {
                        payload: vec![0; 256 * 1024 + extra],
                        ..base.clone()
                    },
                    "payload",
                ),
                (
                    NewMessage {
                        topic: "t".repeat(100 + extra),
                        ..base.clone()
                    },
                    "topic",
                ),
                (
                    NewMessage {
                        key: Some("k".repeat(255 + extra)),
                        ..base.clone()
                    },
                    "key",
                ),
                (
                    NewMessage {
                        content_type: "c".repeat(100 + extra),
                        ..base.clone()
                    },
                    "content_type",
                ),
                (
                    with_headers(
                        (0..64 + extra)
                            .map(|n| (format!("h{n}"), String::new()))
                            .collect(),
                    ),
                    "headers",
                ),
                (
                    with_headers(vec![("n".repeat(64 + extra), "".into())]),
                    "headers[0].name",
                ),
                (
                    with_headers(vec![("n".into(), "v".repeat(4096 + extra))]),
                    "headers[0].value",
                ),
                (
                    with_headers(
                        (0..8)
                            .map(|n| (n.to_string(), "v".repeat(4095)))
                            .chain((extra == 1).then(|| ("e".into(), String::new())))
                            .collect(),
                    ),
                    "headers",
                ),
                (
                    NewMessage {
                        deliver_after: Some(
                            Timestamp::default()
                                .after(DELIVER_AFTER + Duration::from_secs(extra as u64)),
                        ),
                        ..base.clone()
                    },
                    "deliver_after",
                ),
            ];
            for (message, field) in cases {
                assert_eq!(
                    refused(&message),
                    wanted(field),
                    "{field} with {extra} more"
                );
            }
        }
    }

    #[test]
    fn names_that_a_broker_would_act_on_are_refused() {
        for name in [
            "CC",
            "cc",
            "Bcc",
            "x-delay",
            "X-Retry",
            "handfast-key",
            "Handfast-Any",
            "",
        ] {
            let message = with_headers(vec![(name.into(), "v".into())]);
            assert_eq!(
                refused(&message).as_deref(),
                Some("headers[0].name"),
                "{name}"
            );
        }
    }

    #[test]
    fn nul_and_emptiness_are_refused() {
        let base = a_message();
        let cases = [
            (
                NewMessage {
                    topic: "a\0b".into(),
                    ..base.clone()
                },
                "topic",
            ),
            (
                NewMessage {
                    topic: String::new(),
                    ..base.clone()
                },
                "topic",
            ),
            (
                NewMessage {
                    key: Some(String::new()),
                    ..base.clone()
                },
                "key",
            ),
            (
                NewMessage {
                    key: Some("\0".into()),
                    ..base.clone()
                },
                "key",
            ),
            (
                with_headers(vec![("a".into(), "\0".into())]),
                "headers[0].value",
            ),
            (
                with_headers(vec![("a".into(), "1".into()), ("a".into(), "2".into())]),
                "headers[1].name",
            ),
        ];
        for (message, field) in cases {
            assert_eq!(refused(&message).as_deref(), Some(field));
        }
    }

    #[test]
    fn a_time_in_the_past_means_at_once() {
        let message = NewMessage {
            deliver_after: Some(Timestamp::from_micros(-5)),
            ..a_message()
        };
        assert_eq!(refused(&message), None);
    }
}
