//! What a confirm leases to its own process: permits, and the deliveries that wait to be sent.
//!
//! A lease is only worth its name if the process sends soon. So a confirm gets a permit for as
//! much as is sure to go out at once, bounded by number and bytes; whatever it has no permit for
//! is due for any process, and a claim brings it. No body waits here.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::store::{Handed, Handoff};

/// Deliveries that are permitted or wait, of one subscription and of all: what RabbitMQ takes within
/// half a lease even if it takes only some hundreds per second.
const MOST: usize = 4_000;
const MOST_OF_ALL: usize = 8_000;
/// No permit is given while what waits has this many bytes of bodies.
const MOST_BYTES: usize = 8 * 1024 * 1024;

/// A delivery that a confirm has leased to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    /// Which.
    pub handed: Handed,
    /// Monotonic time at which its confirm was asked for; its lease is at least that old.
    pub leased_at: Duration,
}

/// What a confirm may lease. What was not used is free again when it is dropped.
#[derive(Debug)]
pub struct Permit {
    handoff: Handoff,
    leased_at: Duration,
    of: Option<Arc<Handoffs>>,
}

impl Permit {
    /// Permits nothing.
    pub fn none() -> Self {
        Self::none_at(Duration::ZERO)
    }

    /// Permits nothing to a confirm that is asked for at this monotonic time. It may be joined
    /// with others that have permits, and then get some of what those may lease.
    pub fn none_at(now: Duration) -> Self {
        Self {
            handoff: Handoff::none(),
            leased_at: now,
            of: None,
        }
    }

    /// For the store.
    pub fn handoff(&self) -> Handoff {
        self.handoff.clone()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            of.free(&self.handoff.room);
        }
    }
}

/// The permits that are out, and what waits to be sent.
#[derive(Default)]
pub struct Handoffs {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    shares: BTreeMap<String, Share>,
    /// Who has something that waits; whose turn it is comes first.
    turns: VecDeque<String>,
    bytes: usize,
    closed: bool,
}

#[derive(Default)]
struct Share {
    permitted: usize,
    waiting: VecDeque<Leased>,
}

impl Handoffs {
    /// Permits a confirm of so many messages, at this monotonic time, to lease what these
    /// subscriptions have room for.
    pub fn permit(
        self: &Arc<Self>,
        messages: usize,
        lease: Duration,
        now: Duration,
        room: impl IntoIterator<Item = (String, u64)>,
    ) -> Permit {
        let mut state = self.lock();
        if state.closed || state.bytes >= MOST_BYTES {
            return Permit::none_at(now);
        }
        let taken = |share: &Share| share.permitted + share.waiting.len();
        let all: usize = state.shares.values().map(taken).sum();
        let mut left = MOST_OF_ALL.saturating_sub(all);
        let mut permitted = BTreeMap::new();
        for (name, room) in room {
            let taken = state.shares.get(&name).map_or(0, taken);
            let most = MOST.min(usize::try_from(room).unwrap_or(MOST));
            let granted = most.saturating_sub(taken).min(messages).min(left);
            if granted > 0 {
                left -= granted;
                state.shares.entry(name.clone()).or_default().permitted += granted;
                permitted.insert(name, granted);
            }
        }
        Permit {
            handoff: Handoff {
                lease,
                room: permitted,
            },
            leased_at: now,
            of: Some(Arc::clone(self)),
        }
    }

    /// Keeps what was leased with a permit until it is taken. Returns what comes too late for
    /// that.
    pub fn keep(&self, permit: &Permit, handed: Vec<Handed>) -> Vec<Leased> {
        let leased = handed.into_iter().map(|handed| Leased {
            handed,
            leased_at: permit.leased_at,
        });
        let mut state = self.lock();
        if state.closed {
            return leased.collect();
        }
        for leased in leased {
            let name = &leased.handed.subscription;
            let share = state.shares.entry(name.clone()).or_default();
            let is_first = share.waiting.is_empty();
            let (name, bytes) = (name.clone(), leased.handed.body_bytes);
            share.waiting.push_back(leased);
            state.bytes += bytes;
            if is_first {
                state.turns.push_back(name);
            }
        }
        Vec::new()
    }

    /// How many deliveries wait.
    pub fn waiting(&self) -> usize {
        let state = self.lock();
        state.shares.values().map(|share| share.waiting.len()).sum()
    }

    /// What waits longest of the subscription whose turn it is, of those that may be sent to: at
    /// most so many, and so many bytes, but at least one.
    pub fn take(
        &self,
        most: usize,
        max_bytes: usize,
        may: impl Fn(&str) -> bool,
    ) -> Option<(String, Vec<Leased>)> {
        let mut state = self.lock();
        let turn = state.turns.iter().position(|name| may(name))?;
        let name = state.turns.remove(turn)?;
        let mut taken = Vec::new();
        let mut bytes = 0;
        let Some(share) = state.shares.get_mut(&name) else {
            return Some((name, taken));
        };
        while taken.len() < most
            && let Some(leased) = share.waiting.pop_front()
        {
            let size = leased.handed.body_bytes;
            if !taken.is_empty() && bytes + size > max_bytes {
                share.waiting.push_front(leased);
                break;
            }
            bytes += size;
            taken.push(leased);
        }
        if share.waiting.is_empty() {
            if share.permitted == 0 {
                state.shares.remove(&name);
            }
        } else {
            state.turns.push_back(name.clone());
        }
        state.bytes = state.bytes.saturating_sub(bytes);
        Some((name, taken))
    }

    /// Permits nothing more. Returns what waits.
    pub fn close(&self) -> Vec<Leased> {
        let mut state = self.lock();
        state.closed = true;
        state.turns.clear();
        state.bytes = 0;
        let shares = std::mem::take(&mut state.shares).into_values();
        shares.flat_map(|share| share.waiting).collect()
    }

    fn free(&self, room: &BTreeMap<String, usize>) {
        let mut state = self.lock();
        for (name, granted) in room {
            let Some(share) = state.shares.get_mut(name) else {
                continue;
            };
            share.permitted = share.permitted.saturating_sub(*granted);
            if share.permitted == 0 && share.waiting.is_empty() {
                state.shares.remove(name);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves whole leases; at worst one waits for its end.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Handoffs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handoffs").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::message::{ContentHash, MessageId, Timestamp};

    const LEASE: Duration = Duration::from_secs(30);
    const NOW: Duration = Duration::from_secs(1);

    fn handed(subscription: &str, body_bytes: usize) -> Handed {
        Handed {
            subscription: subscription.into(),
            id: MessageId::from(Uuid::from_u128(1)),
            token: Uuid::from_u128(2),
            producer: "payment".into(),
            topic: "payment.completed".into(),
            key: None,
            sent_at: Timestamp::from_micros(1),
            body_bytes,
            bucket: 1,
            content_hash: ContentHash::from_bytes([0; 32]),
        }
    }

    fn permit(handoffs: &Arc<Handoffs>, messages: usize, room: &[(&str, u64)]) -> Permit {
        let room = room.iter().map(|(name, room)| ((*name).to_owned(), *room));
        handoffs.permit(messages, LEASE, NOW, room)
    }

    fn room(permit: &Permit, name: &str) -> usize {
        permit.handoff.room.get(name).copied().unwrap_or(0)
    }

    #[test]
    fn permits_are_bounded_by_the_call_the_room_and_what_is_out_or_waits() {
        let handoffs = Arc::new(Handoffs::default());
        let first = permit(&handoffs, 1_600, &[("a", 10_000), ("b", 3)]);
        assert_eq!((room(&first, "a"), room(&first, "b")), (1_600, 3));
        let second = permit(&handoffs, 3_600, &[("a", 10_000), ("b", 3)]);
        assert_eq!((room(&second, "a"), room(&second, "b")), (2_400, 0));
        // What was leased takes the place of its permit; the rest is free again.
        handoffs.keep(&second, vec![handed("a", 1); 400]);
        drop(second);
        let third = permit(&handoffs, 3_600, &[("a", 10_000)]);
        assert_eq!(room(&third, "a"), 2_000);
        drop((first, third));
        let most = permit(&handoffs, 9_000, &[("a", 10_000)]);
        assert_eq!(room(&most, "a"), MOST - 400);
        drop(most);
        assert_eq!(room(&permit(&handoffs, 1_000, &[("b", 3)]), "b"), 3);
    }

    #[test]
    fn permits_of_all_subscriptions_are_bounded_together() {
        let handoffs = Arc::new(Handoffs::default());
        let rooms = [("a", 10_000), ("b", 10_000), ("c", 10_000)];
        let all = permit(&handoffs, 3_000, &rooms);
        let rooms = ["a", "b", "c"].map(|name| room(&all, name));
        assert_eq!(rooms, [3_000, 3_000, 2_000]);
    }

    #[test]
    fn nothing_is_permitted_while_many_bytes_wait() {
        let handoffs = Arc::new(Handoffs::default());
        let one = permit(&handoffs, 1, &[("a", 10)]);
        handoffs.keep(&one, vec![handed("a", MOST_BYTES)]);
        drop(one);
        assert_eq!(room(&permit(&handoffs, 1, &[("b", 10)]), "b"), 0);
        // One is taken however large it is.
        assert_eq!(handoffs.take(10, 1, |_| true).unwrap().1.len(), 1);
        assert_eq!(room(&permit(&handoffs, 1, &[("b", 10)]), "b"), 1);
    }

    #[test]
    fn what_waits_is_taken_in_turn_and_within_its_bytes() {
        let handoffs = Arc::new(Handoffs::default());
        let all = permit(&handoffs, 3, &[("a", 10), ("b", 10)]);
        handoffs.keep(&all, vec![handed("a", 60); 3]);
        handoffs.keep(&all, vec![handed("b", 60)]);
        let next = || {
            handoffs
                .take(2, 100, |_| true)
                .map(|(name, all)| (name, all.len()))
        };
        assert_eq!(next(), Some(("a".into(), 1)));
        assert_eq!(next(), Some(("b".into(), 1)));
        assert_eq!(next(), Some(("a".into(), 1)));
        assert_eq!(next(), Some(("a".into(), 1)));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_closed_handoff_permits_and_keeps_nothing() {
        let handoffs = Arc::new(Handoffs::default());
        let out = permit(&handoffs, 2, &[("a", 10)]);
        handoffs.keep(&out, vec![handed("a", 1)]);
        assert_eq!(handoffs.close().len(), 1);
        assert_eq!(handoffs.keep(&out, vec![handed("a", 1)]).len(), 1);
        drop(out);
        assert_eq!(room(&permit(&handoffs, 1, &[("a", 10)]), "a"), 0);
        assert_eq!(handoffs.take(1, 1, |_| true), None);
    }
}
