//! SENT is written late, and not at all where the answer came first.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::message::MessageId;
use crate::store::{Error, Sent, Store};

/// Rows in one write.
const SLICE: usize = 500;

/// What RabbitMQ has confirmed and the store does not know yet.
#[derive(Debug, Default)]
pub(super) struct Unmarked {
    sent: Mutex<BTreeMap<String, HashMap<MessageId, Uuid>>>,
}

impl Unmarked {
    /// RabbitMQ has these.
    pub(super) fn add(&self, subscription: &str, sent: impl IntoIterator<Item = Sent>) {
        let mut all = self.lock();
        let known = all.entry(subscription.to_owned()).or_default();
        known.extend(sent.into_iter().map(|sent| (sent.id, sent.token)));
    }

    /// Their answers are durable, so nothing needs to be written.
    pub(super) fn answered(&self, subscription: &str, ids: &[MessageId]) {
        if let Some(known) = self.lock().get_mut(subscription) {
            for id in ids {
                known.remove(id);
            }
        }
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.lock().values().map(HashMap::len).sum()
    }

    /// Writes what waits. What cannot be written waits on; its lease ends if that takes too
    /// long, and then it is sent again.
    pub(super) async fn write(
        &self,
        store: &dyn Store,
        resend_after: Duration,
    ) -> Result<usize, Error> {
        let subscriptions: Vec<String> = self.lock().keys().cloned().collect();
        let mut written = 0;
        for name in subscriptions {
            let waiting: Vec<Sent> = self.lock().get(&name).map_or_else(Vec::new, |known| {
                let sent = known.iter().map(|(id, token)| (*id, *token));
                sent.map(|(id, token)| Sent { id, token }).collect()
            });
            for slice in waiting.chunks(SLICE) {
                written += store.mark_sent(&name, slice.to_vec(), resend_after).await?;
                if let Some(known) = self.lock().get_mut(&name) {
                    for Sent { id, token } in slice {
                        // A later send of the same message has another token and waits on.
                        if known.get(id) == Some(token) {
                            known.remove(id);
                        }
                    }
                }
            }
        }
        self.lock().retain(|_, known| !known.is_empty());
        Ok(written)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, HashMap<MessageId, Uuid>>> {
        // A panic while the lock is held leaves whole entries.
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
