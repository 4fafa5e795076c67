//! One fact, as its producer hands it over.

use std::time::{SystemTime, UNIX_EPOCH};

use handfast_proto::v1;
use prost::bytes::Bytes;
use uuid::Uuid;

use crate::fence::FenceIdentity;

/// A fact to be told: a topic and what is to be said about it.
///
/// It has no id; every try of a transaction makes its own. Limits are checked by the service,
/// which names the field that breaks one.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    topic: String,
    key: Option<String>,
    content_type: String,
    headers: Vec<(String, String)>,
    payload: Bytes,
    deliver_after_us: Option<i64>,
}

impl Message {
    /// A message without a payload, on a topic that the service knows.
    pub fn new(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            key: None,
            content_type: String::new(),
            headers: Vec::new(),
            payload: Bytes::new(),
            deliver_after_us: None,
        }
    }

    /// Sets the producer's own identity of the fact, 1 to 255 bytes. Within producer and topic
    /// at most one message that was not cancelled holds it.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets the payload and its type, such as `application/protobuf`.
    #[must_use]
    pub fn payload(mut self, content_type: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        self.content_type = content_type.into();
        self.payload = payload.into();
        self
    }

    /// Sets the payload to `value` as JSON, and its type to `application/json`. Fails if
    /// `value` cannot be written as JSON.
    pub fn json<T: serde::Serialize + ?Sized>(self, value: &T) -> Result<Self, serde_json::Error> {
        let payload = serde_json::to_vec(value)?;
        Ok(self.payload("application/json", payload))
    }

    /// Adds a header; the names `CC`, `BCC`, `x-*` and `handfast-*` are refused by the service.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the time before which nobody gets the message, at most 30 days ahead.
    #[must_use]
    pub fn deliver_after(mut self, time: SystemTime) -> Self {
        // A time out of range is sent as the nearest one there is; the service refuses it.
        let us = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |us| -us),
        };
        self.deliver_after_us = Some(us);
        self
    }

    pub(crate) fn to_wire(&self, id: Uuid, fence: Option<FenceIdentity>) -> v1::NewMessage {
        v1::NewMessage {
            id: id.as_bytes().to_vec(),
            topic: self.topic.clone(),
            key: self.key.clone(),
            content_type: self.content_type.clone(),
            headers: self
                .headers
                .iter()
                .map(|(name, value)| v1::Header {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect(),
            payload: self.payload.clone(),
            deliver_after: self.deliver_after_us,
            fence: fence.map_or_else(Vec::new, |fence| fence.as_bytes().to_vec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_built_is_what_is_sent() {
        let id = Uuid::now_v7();
        let message = Message::new("payment.completed")
            .key("shop/42")
            .json(&serde_json::json!({"amount": 5}))
            .unwrap()
            .header("trace", "1")
            .deliver_after(UNIX_EPOCH + Duration::from_secs(2));
        let wire = message.to_wire(id, None);
        assert_eq!(wire.id, id.as_bytes());
        assert_eq!(wire.topic, "payment.completed");
        assert_eq!(wire.key.as_deref(), Some("shop/42"));
        assert_eq!(wire.content_type, "application/json");
        assert_eq!(&wire.payload[..], br#"{"amount":5}"#);
        assert_eq!(wire.headers[0].name, "trace");
        assert_eq!(wire.deliver_after, Some(2_000_000));
        assert!(wire.fence.is_empty());
    }
}
