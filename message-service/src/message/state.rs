//! The life of a message.
//!
//! ```text
//!  prepare ──▶ PREPARED ── confirm | verdict COMMITTED ──▶ CONFIRMED
//!                 └─────── cancel | verdict ROLLED_BACK ──▶ CANCELLED
//! ```
//!
//! CONFIRMED and CANCELLED are final against each other. A repeat of what already happened
//! is success, because the producer may have lost our first reply.

use std::fmt;

/// Where a message is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MessageState {
    /// Stored, withheld until the producer's transaction is known to have committed.
    Prepared,
    /// The transaction committed; one delivery per active subscription exists.
    Confirmed,
    /// The transaction rolled back; no consumer will see the message.
    Cancelled,
}

/// What can happen to a message that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageEvent {
    /// The producer hands it over, perhaps again.
    Prepare,
    /// The producer, a verdict or an operator says that the transaction committed.
    Confirm,
    /// The producer, a verdict or an operator says that the transaction rolled back.
    Cancel,
    /// The producer hands over a fact that is already true.
    Publish,
}

/// What an event did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<S> {
    /// The new state is to be written.
    Moves(S),
    /// It was so before; nothing is written.
    AlreadySo,
}

/// An event that the state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {event} a message that is {state}")]
pub struct WrongState {
    /// What was asked.
    pub event: MessageEvent,
    /// What the message is.
    pub state: MessageState,
}

impl WrongState {
    /// True if the event contradicts a final decision: with a working fence that cannot
    /// happen, so the message is marked CONFLICT as evidence of a fault.
    pub fn is_conflict(&self) -> bool {
        match (self.event, self.state) {
            (MessageEvent::Confirm | MessageEvent::Publish, MessageState::Cancelled)
            | (MessageEvent::Cancel, MessageState::Confirmed) => true,
            (MessageEvent::Prepare, _)
            | (MessageEvent::Confirm | MessageEvent::Publish | MessageEvent::Cancel, _) => false,
        }
    }
}

impl MessageState {
    /// Every state.
    pub const ALL: [Self; 3] = [Self::Prepared, Self::Confirmed, Self::Cancelled];

    /// What the event makes of this state.
    pub fn apply(self, event: MessageEvent) -> Result<Effect<Self>, WrongState> {
        match (self, event) {
            (Self::Prepared, MessageEvent::Prepare) => Ok(Effect::AlreadySo),
            // A client that looks only at the status runs its business after an OK, so a
            // prepare of what is decided must not be OK.
            (Self::Confirmed | Self::Cancelled, MessageEvent::Prepare) => self.refuse(event),
            (Self::Prepared, MessageEvent::Confirm | MessageEvent::Publish) => {
                Ok(Effect::Moves(Self::Confirmed))
            }
            (Self::Confirmed, MessageEvent::Confirm | MessageEvent::Publish) => {
                Ok(Effect::AlreadySo)
            }
            (Self::Cancelled, MessageEvent::Confirm | MessageEvent::Publish) => self.refuse(event),
            (Self::Prepared, MessageEvent::Cancel) => Ok(Effect::Moves(Self::Cancelled)),
            (Self::Cancelled, MessageEvent::Cancel) => Ok(Effect::AlreadySo),
            (Self::Confirmed, MessageEvent::Cancel) => self.refuse(event),
        }
    }

    /// The word that the store, the API and people use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "PREPARED",
            Self::Confirmed => "CONFIRMED",
            Self::Cancelled => "CANCELLED",
        }
    }

    /// Reads the word; `None` for one that a newer version may have written.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    fn refuse(self, event: MessageEvent) -> Result<Effect<Self>, WrongState> {
        Err(WrongState { event, state: self })
    }
}

impl fmt::Display for MessageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for MessageEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Confirm => "confirm",
            Self::Cancel => "cancel",
            Self::Publish => "publish",
        })
    }
}

#[cfg(test)]
mod tests;
