//! When two messages are the same fact.

use sha2::{Digest as _, Sha256};

use super::NewMessage;

/// Headers that differ on every retry of the same call and so are not content.
const TRACE_CONTEXT: [&str; 3] = ["traceparent", "tracestate", "baggage"];

/// SHA-256 over topic, key, content type, payload and sorted headers without trace context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// The hash of a message's content. Every part is preceded by its length, so that moving
    /// a byte from one part to the next gives another hash.
    pub fn of(message: &NewMessage) -> Self {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        part(message.topic.as_bytes());
        match &message.key {
            Some(key) => {
                part(b"key");
                part(key.as_bytes());
            }
            None => part(b""),
        }
        part(message.content_type.as_bytes());
        part(&message.payload);
        let mut headers: Vec<_> = message
            .headers
            .iter()
            .filter(|(name, _)| {
                !TRACE_CONTEXT
                    .iter()
                    .any(|trace| name.eq_ignore_ascii_case(trace))
            })
            .collect();
        headers.sort();
        for (name, value) in headers {
            part(name.as_bytes());
            part(value.as_bytes());
        }
        Self(hash.finalize().into())
    }

    /// The hash that these bytes are.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::limits::tests::a_message;

    #[test]
    fn order_of_headers_and_trace_context_do_not_matter() {
        let mut one = a_message();
        one.headers = vec![("a".into(), "1".into()), ("b".into(), "2".into())];
        let mut two = one.clone();
        two.headers.reverse();
        two.headers.push(("TraceParent".into(), "00-1".into()));
        assert_eq!(one.content_hash(), two.content_hash());
    }

    #[test]
    fn every_part_of_the_content_matters() {
        let base = a_message();
        let changed = [
            NewMessage {
                topic: "other".into(),
                ..base.clone()
            },
            NewMessage {
                key: Some("other".into()),
                ..base.clone()
            },
            NewMessage {
                key: None,
                ..base.clone()
            },
            NewMessage {
                content_type: "text/plain".into(),
                ..base.clone()
            },
            NewMessage {
                payload: b"other".to_vec(),
                ..base.clone()
            },
            NewMessage {
                headers: vec![("a".into(), "1".into())],
                ..base.clone()
            },
        ];
        for other in changed {
            assert_ne!(base.content_hash(), other.content_hash(), "{other:?}");
        }
    }

    #[test]
    fn a_byte_that_moves_between_parts_changes_the_hash() {
        let one = NewMessage {
            topic: "ab".into(),
            key: Some("c".into()),
            ..a_message()
        };
        let two = NewMessage {
            topic: "a".into(),
            key: Some("bc".into()),
            ..a_message()
        };
        assert_ne!(one.content_hash(), two.content_hash());
    }
}
