//! The bodies that this process wrote lately, so that most sends need not read them back.
//!
//! Only a speed-up: what is not here is read. A body is taken for a message only if it has the content
//! hash that the confirm has found in the message's row, whatever happened to the id meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bodies::Body;
use super::rows::clean;
use crate::message::{ContentHash, MessageId, NewMessage};

/// Bytes of bodies that are kept. At 10,000 messages of 1 KiB per second these are the bodies of
/// 0.8 s, and most confirms come sooner.
const BYTES: usize = 8 * 1024 * 1024;
/// What a body takes beside its bytes, so that empty ones are bounded, too.
const OVERHEAD: usize = 256;

/// The bodies, oldest first out.
#[derive(Default)]
pub(super) struct Recent {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bodies: HashMap<MessageId, (ContentHash, Arc<Body>)>,
    /// In the order in which they came, with their size.
    order: VecDeque<(MessageId, usize)>,
    bytes: usize,
}

impl Recent {
    /// Keeps the body of a message that was written with this hash.
    pub(super) fn keep(&self, message: &NewMessage, hash: ContentHash) {
        let bytes = message.body_bytes() + message.content_type.len() + OVERHEAD;
        if bytes > BYTES / 8 {
            return;
        }
        let body = Body {
            content_type: clean(&message.content_type),
            headers: message.headers.clone(),
            payload: message.payload.clone(),
        };
        let kept = (hash, Arc::new(body));
        let mut state = self.lock();
        state.bodies.insert(message.id, kept);
        state.order.push_back((message.id, bytes));
        state.bytes += bytes;
        while state.bytes > BYTES
            && let Some((id, bytes)) = state.order.pop_front()
        {
            // The same id twice is rare; then the second goes with the first.
            state.bodies.remove(&id);
            state.bytes -= bytes;
        }
    }

    /// The body of this message, if it is here.
    pub(super) fn get(&self, id: MessageId, hash: &ContentHash) -> Option<Arc<Body>> {
        let state = self.lock();
        let (kept, body) = state.bodies.get(&id)?;
        (kept == hash).then(|| Arc::clone(body))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held can lose count of some bytes, and no body.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn message(id: u128, payload: &[u8]) -> NewMessage {
        NewMessage {
            id: MessageId::from(Uuid::from_u128(id)),
            producer: "payment".into(),
            topic: "payment.completed".into(),
            key: None,
            content_type: String::new(),
            headers: Vec::new(),
            payload: payload.to_vec(),
            deliver_after: None,
            fence: None,
        }
    }

    fn keep(recent: &Recent, message: &NewMessage) {
        recent.keep(message, message.content_hash());
    }

    fn payload(recent: &Recent, of: &NewMessage) -> Option<Vec<u8>> {
        let body = recent.get(of.id, &of.content_hash())?;
        Some(body.payload.clone())
    }

    #[test]
    fn a_body_is_taken_for_its_own_content_only() {
        let recent = Recent::default();
        let (one, other) = (message(1, b"one"), message(1, b"other"));
        keep(&recent, &one);
        assert_eq!(payload(&recent, &one), Some(b"one".to_vec()));
        assert_eq!(payload(&recent, &other), None);
        keep(&recent, &other);
        assert_eq!(payload(&recent, &one), None);
        assert_eq!(payload(&recent, &other), Some(b"other".to_vec()));
    }

    #[test]
    fn the_oldest_bodies_go_when_there_are_too_many_bytes() {
        let recent = Recent::default();
        let large = vec![b'x'; BYTES / 8 - OVERHEAD];
        let messages: Vec<_> = (1..=20).map(|id| message(id, &large)).collect();
        messages.iter().for_each(|message| keep(&recent, message));
        let here = |message: &&NewMessage| payload(&recent, message).is_some();
        assert_eq!(messages.iter().filter(here).count(), 8);
        assert!(!here(&&messages[0]) && here(&&messages[19]));
        let too_large = message(21, &vec![b'x'; BYTES / 4]);
        keep(&recent, &too_large);
        assert_eq!(payload(&recent, &too_large), None);
        let state = recent.lock();
        assert_eq!(state.bodies.len(), state.order.len());
    }

    #[test]
    fn bodies_without_a_byte_are_bounded_too() {
        let recent = Recent::default();
        let many = (BYTES / OVERHEAD) as u128;
        for id in 1..=2 * many {
            keep(&recent, &message(id, b""));
        }
        assert_eq!(recent.lock().bodies.len() as u128, many);
    }
}
