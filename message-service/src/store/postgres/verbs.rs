//! What the producer's verbs have in common.
//!
//! A statement writes what is new or may move; what it did not return is read in a second one and
//! answered as a repeat or a refusal. What looks as if it could still be written, because somebody
//! else's write was rolled back or came in between, goes round again.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use super::lanes::Replies;
use super::rows::{get, id, message_state, moved_on, uuid};
use super::session::Session;
use crate::message::{MessageId, MessageState};
use crate::store::{Error, Handed, ItemResult, Written};

use super::handoff::Confirmed;

/// Rounds without any progress after which the rest is given up.
pub(super) const IDLE_ROUNDS: u32 = 4;

/// Which item of which call.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) call: usize,
    pub(super) item: usize,
}

/// What is answered so far.
pub(super) struct Answers {
    calls: Vec<CallAnswers>,
}

struct CallAnswers {
    items: Vec<Option<ItemResult>>,
    topics: BTreeSet<String>,
    handed: Vec<Handed>,
    failure: Option<Error>,
}

impl Answers {
    pub(super) fn new(lengths: impl Iterator<Item = usize>) -> Self {
        let calls = lengths
            .map(|length| CallAnswers {
                items: vec![None; length],
                topics: BTreeSet::new(),
                handed: Vec::new(),
                failure: None,
            })
            .collect();
        Self { calls }
    }

    pub(super) fn item(&mut self, place: Place, result: ItemResult) {
        self.calls[place.call].items[place.item] = Some(result);
    }

    /// A message was confirmed by this call.
    pub(super) fn confirmed(&mut self, place: Place, confirmed: Confirmed) {
        let call = &mut self.calls[place.call];
        if confirmed.is_due {
            call.topics.insert(confirmed.topic);
        }
        call.handed.extend(confirmed.handed);
    }

    /// A row that cannot be understood fails the call that asked about it.
    pub(super) fn fail(&mut self, place: Place, error: Error) {
        self.calls[place.call].failure.get_or_insert(error);
    }

    pub(super) fn finish(
        mut self,
        doing: &'static str,
        given_up: impl IntoIterator<Item = Place>,
    ) -> Replies<Written> {
        for place in given_up {
            self.fail(place, moved_on(doing));
        }
        let finish = |call: CallAnswers| {
            if let Some(error) = call.failure {
                return Err(error);
            }
            let items: Option<Vec<ItemResult>> = call.items.into_iter().collect();
            let items = items.ok_or_else(|| moved_on(doing))?;
            let (topics, handed) = (call.topics, call.handed);
            Ok(Written {
                items,
                topics,
                handed,
            })
        };
        self.calls.into_iter().map(finish).collect()
    }
}

/// What a verb needs to know of a stored message.
pub(super) struct Stored {
    pub(super) producer: String,
    /// The word, if this version does not know it.
    pub(super) state: Result<MessageState, Error>,
    pub(super) content_hash: Vec<u8>,
}

pub(super) async fn stored(
    db: &mut Session,
    ids: impl Iterator<Item = MessageId>,
    doing: &'static str,
) -> Result<HashMap<MessageId, Stored>, sqlx::Error> {
    let ids: Vec<Uuid> = ids.map(uuid).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = db
        .fetch(
            "-- what is stored
             SELECT id, producer, state, content_hash FROM message WHERE id = ANY($1)",
            |query| query.bind(&ids),
        )
        .await?;
    rows.iter()
        .map(|row| {
            let stored = Stored {
                producer: get(row, "producer")?,
                state: message_state(row, doing)?,
                content_hash: get(row, "content_hash")?,
            };
            Ok((id(row, "id")?, stored))
        })
        .collect()
}

pub(super) fn unknown(doing: &'static str, error: &Error) -> Error {
    Error::Inconsistent {
        doing,
        what: match error {
            Error::Inconsistent { what, .. } => what.clone(),
            other => other.to_string(),
        },
    }
}
