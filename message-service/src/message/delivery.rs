//! The life of a delivery: one message for one subscription.
//!
//! ```text
//!  PENDING ── publisher confirm ──▶ SENT ── CONSUMED ──▶ CONSUMED
//!     ▲                              │
//!     └── FAILED, LATER, passed by ──┘   attempts used up | REJECTED ──▶ DEAD ── redrive ──▶ PENDING
//!                                                                         └── skip ──▶ SKIPPED
//! ```
//!
//! SENT is written late, so everything that is legal in SENT is legal in PENDING. Silence is
//! not an attempt; an answer FAILED is, and a send that its subscription has passed by.

use std::fmt;
use std::time::Duration;

use super::policy::{Chance, DeliveryPolicy};
use super::{MessageId, Timestamp};

/// How many streams may end over an unanswered delivery before that counts as FAILED: the
/// counterpart of a queue's `x-delivery-limit`.
pub const STREAM_ENDS_PER_FAILURE: u32 = 5;

/// How many channels the broker may close with a protocol error over a delivery before it is
/// DEAD.
pub const CLOSES_PER_DEATH: u32 = 3;

/// How long a suspect waits before it is sent again, alone.
pub const SUSPECT_WAIT: Duration = Duration::from_secs(1);

/// LATER may be answered this often in a row before it waits at least the schedule's step.
pub const FREE_LATERS: u32 = 3;

/// Where a delivery is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeliveryState {
    /// Waits for its time, or for a consumer.
    Pending,
    /// The broker answers for it; the consumer's answer is awaited.
    Sent,
    /// The consumer's effect is durable.
    Consumed,
    /// Attempts used up, too old, or rejected; a person decides.
    Dead,
    /// Given up by an operator, or its subscription was removed.
    Skipped,
}

/// What the store knows of a delivery when something happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Where it is.
    pub state: DeliveryState,
    /// Answers FAILED and sends that were passed by, since the last redrive.
    pub attempts: u32,
    /// The number of the last send or redrive; 0 before the first.
    pub generation: u32,
    /// The last generation whose FAILED, LATER or REJECTED was counted.
    pub answered_generation: u32,
    /// Answers LATER in a row.
    pub laters: u32,
    /// How often what carried it ended over it, a stream or a channel; above 0 it is sent alone.
    pub stream_ends: u32,
    /// When its message was confirmed.
    pub confirmed_at: Timestamp,
    /// When it was last sent.
    pub sent_at: Option<Timestamp>,
}

/// A consumer's word on a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which message; the subscription is the caller's.
    pub id: MessageId,
    /// The send it belongs to.
    pub generation: u32,
    /// When that send was, as the wire carried it; `None` if the consumer does not know.
    pub sent_at: Option<Timestamp>,
    /// What became of it.
    pub kind: AnswerKind,
}

/// What a consumer may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// The effect is durable.
    Consumed,
    /// Try again by the schedule.
    Failed(String),
    /// Try again after this long; does not count.
    Later(Duration),
    /// Never try again.
    Rejected(String),
}

/// What can happen to a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeliveryEvent<'a> {
    /// The consumer answered the send with this generation.
    Answer(u32, &'a AnswerKind),
    /// Something sent later was answered, or the queue was seen empty: the send with this
    /// generation is lost.
    PassedBy(u32),
    /// The stream that held the send with this generation ended unanswered. `counts` is false
    /// if it was the service that ended it.
    StreamEnded {
        /// The send that the stream held.
        generation: u32,
        /// Whether the end may be the delivery's fault.
        counts: bool,
    },
    /// Its queue did not take the send that holds the lease.
    Refused {
        /// What the broker said.
        reason: &'a str,
        /// When it is due again.
        retry_after: Duration,
    },
    /// The broker closed the channel with a protocol error over the send that holds the lease.
    Suspected(&'a str),
    /// The send that holds the lease was not tried.
    Untried,
    /// It was confirmed longer ago than its subscription's `max_age`.
    TooOld,
    /// Its subscription was removed, or an operator gave it up.
    Skip,
}

/// What an event makes of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To be sent again at this time.
    Again {
        /// When.
        due_at: Timestamp,
        /// The counters as they now are.
        attempts: u32,
        /// Answers LATER in a row.
        laters: u32,
        /// Ended streams.
        stream_ends: u32,
        /// Why, for people.
        error: Option<String>,
    },
    /// The effect is durable.
    Consumed,
    /// Given up, with the reason.
    Dead {
        /// The counter as it now is.
        attempts: u32,
        /// Why, for people.
        error: String,
    },
    /// Given up on purpose.
    Skipped,
    /// It happened before; nothing is written. A success.
    AlreadySo,
    /// It speaks of an earlier send, or of a finished delivery; nothing is written. A success.
    Stale,
}

impl Delivery {
    /// What the event makes of this delivery.
    pub fn apply(
        &self,
        event: &DeliveryEvent<'_>,
        policy: &DeliveryPolicy,
        now: Timestamp,
        chance: Chance,
    ) -> Outcome {
        match event {
            DeliveryEvent::Answer(generation, kind) => {
                self.answered(*generation, kind, policy, now, chance)
            }
            DeliveryEvent::PassedBy(generation) => {
                if !self.awaits(*generation) {
                    return Outcome::Stale;
                }
                // The wait is counted from the send, which was long ago: the first resend is
                // due at once, and later ones keep to the schedule.
                let sent_at = self.sent_at.unwrap_or(now);
                self.failed(
                    "passed by: a later send was answered",
                    policy,
                    chance,
                    |step| sent_at.after(step).max(now),
                )
            }
            DeliveryEvent::StreamEnded { generation, counts } => {
                if !self.awaits(*generation) {
                    return Outcome::Stale;
                }
                self.came_back(*counts, policy, now, chance)
            }
            DeliveryEvent::Refused {
                reason,
                retry_after,
            } => self.not_sent(now.after(*retry_after), self.stream_ends, Some(reason)),
            DeliveryEvent::Suspected(reason) => {
                let closes = self.stream_ends + 1;
                if self.is_leased() && closes >= CLOSES_PER_DEATH {
                    return Outcome::Dead {
                        attempts: self.attempts,
                        error: format!("the broker closed {closes} channels over it: {reason}"),
                    };
                }
                self.not_sent(now.after(SUSPECT_WAIT), closes, Some(reason))
            }
            DeliveryEvent::Untried => self.not_sent(now, self.stream_ends, None),
            DeliveryEvent::TooOld => match self.state {
                DeliveryState::Pending | DeliveryState::Sent => Outcome::Dead {
                    attempts: self.attempts,
                    error: "older than the subscription's max_age".to_owned(),
                },
                DeliveryState::Consumed | DeliveryState::Dead | DeliveryState::Skipped => {
                    Outcome::Stale
                }
            },
            DeliveryEvent::Skip => match self.state {
                DeliveryState::Pending | DeliveryState::Sent | DeliveryState::Dead => {
                    Outcome::Skipped
                }
                DeliveryState::Skipped => Outcome::AlreadySo,
                DeliveryState::Consumed => Outcome::Stale,
            },
        }
    }

    fn answered(
        &self,
        generation: u32,
        kind: &AnswerKind,
        policy: &DeliveryPolicy,
        now: Timestamp,
        chance: Chance,
    ) -> Outcome {
        // A true "done" is never refused: not from an old send, and not after we gave up.
        if *kind == AnswerKind::Consumed {
            return match self.state {
                DeliveryState::Consumed => Outcome::AlreadySo,
                DeliveryState::Pending
                | DeliveryState::Sent
                | DeliveryState::Dead
                | DeliveryState::Skipped => Outcome::Consumed,
            };
        }
        if !self.awaits(generation) {
            return Outcome::Stale;
        }
        match kind {
            AnswerKind::Consumed => Outcome::Consumed,
            AnswerKind::Failed(reason) => {
                self.failed(reason, policy, chance, |step| now.after(step))
            }
            AnswerKind::Later(wait) => {
                let laters = self.laters + 1;
                // A consumer that says LATER for ever must not be asked in a tight loop.
                let least = if laters > FREE_LATERS {
                    policy.step(self.attempts + 1, chance)
                } else {
                    Duration::ZERO
                };
                Outcome::Again {
                    due_at: now.after((*wait).max(least)),
                    attempts: self.attempts,
                    laters,
                    stream_ends: self.stream_ends,
                    error: None,
                }
            }
            AnswerKind::Rejected(reason) => Outcome::Dead {
                attempts: self.attempts,
                error: format!("rejected: {reason}"),
            },
        }
    }

    /// Back to its queue of due deliveries, without counting anything.
    fn not_sent(&self, due_at: Timestamp, stream_ends: u32, reason: Option<&str>) -> Outcome {
        if !self.is_leased() {
            return Outcome::Stale;
        }
        Outcome::Again {
            due_at,
            attempts: self.attempts,
            laters: self.laters,
            stream_ends,
            error: reason.map(str::to_owned),
        }
    }

    /// True while a send can be under way that is not known to have happened. The store repeats
    /// the lease itself.
    fn is_leased(&self) -> bool {
        match self.state {
            DeliveryState::Pending => self.awaits(self.generation),
            DeliveryState::Sent
            | DeliveryState::Consumed
            | DeliveryState::Dead
            | DeliveryState::Skipped => false,
        }
    }

    fn came_back(
        &self,
        counts: bool,
        policy: &DeliveryPolicy,
        now: Timestamp,
        chance: Chance,
    ) -> Outcome {
        let stream_ends = self.stream_ends + u32::from(counts);
        if counts && stream_ends.is_multiple_of(STREAM_ENDS_PER_FAILURE) {
            let ended = Self {
                stream_ends,
                ..self.clone()
            };
            let reason = format!(
                "its consumer's stream ended {stream_ends} times before an answer; \
                 the message may be what ends the consumer"
            );
            return ended.failed(&reason, policy, chance, |step| now.after(step));
        }
        Outcome::Again {
            due_at: now,
            attempts: self.attempts,
            laters: self.laters,
            stream_ends,
            error: None,
        }
    }

    /// Counts an attempt.
    fn failed(
        &self,
        reason: &str,
        policy: &DeliveryPolicy,
        chance: Chance,
        due: impl FnOnce(Duration) -> Timestamp,
    ) -> Outcome {
        let attempts = self.attempts + 1;
        if policy.used_up(attempts) {
            return Outcome::Dead {
                attempts,
                error: reason.to_owned(),
            };
        }
        Outcome::Again {
            due_at: due(policy.step(attempts, chance)),
            attempts,
            laters: 0,
            stream_ends: self.stream_ends,
            error: Some(reason.to_owned()),
        }
    }

    /// True if the send with this generation is the last one and nothing was counted for it.
    fn awaits(&self, generation: u32) -> bool {
        match self.state {
            DeliveryState::Pending | DeliveryState::Sent => {
                generation > 0
                    && generation == self.generation
                    && generation > self.answered_generation
            }
            DeliveryState::Consumed | DeliveryState::Dead | DeliveryState::Skipped => false,
        }
    }
}

impl DeliveryState {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Sent,
        Self::Consumed,
        Self::Dead,
        Self::Skipped,
    ];

    /// The word that the store, the API and people use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Sent => "SENT",
            Self::Consumed => "CONSUMED",
            Self::Dead => "DEAD",
            Self::Skipped => "SKIPPED",
        }
    }

    /// Reads the word; `None` for one that a newer version may have written.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// PENDING, SENT and DEAD keep their message from being finished.
    pub const fn is_open(self) -> bool {
        match self {
            Self::Pending | Self::Sent | Self::Dead => true,
            Self::Consumed | Self::Skipped => false,
        }
    }
}

impl fmt::Display for DeliveryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests;
