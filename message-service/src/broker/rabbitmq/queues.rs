//! What is known of each subscription's queue: whether it may be sent to, and how much fits.
//!
//! All of it is memory that a restart may lose. What decides is in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::store::{Due, Heard};
use crate::topology::Topology;

/// How many messages may wait in a queue, if its subscription does not say.
const LEAST_IN_QUEUE: u64 = 10_000;
/// A queue may hold what its subscription answers in this time, if that is more.
const SECONDS_IN_QUEUE: f64 = 5.0;
/// What drains fills a queue up to this many messages, or to what its subscription answers in
/// [`SECONDS_OF_BACKLOG`]: what is confirmed now stands behind it, and is not to wait for long.
const LEAST_OF_BACKLOG: u64 = 2_000;
const SECONDS_OF_BACKLOG: f64 = 0.5;
/// What drains is claimed when there is room for so many, rather than one by one as answers come.
const WORTH_A_CLAIM: u64 = 50;
/// How much a new second weighs in the recent answer rate.
const WEIGHT: f64 = 0.3;
/// How long a queue that gave no answer is not looked at.
const SILENT_WAIT: Duration = Duration::from_secs(5);
/// How long a queue must have been seen empty before what was sent to it is looked for: by
/// then answers that were on their way are here.
const EMPTY_FOR: Duration = Duration::from_secs(3);
/// The same where other processes take answers, too: one that stands still keeps what it has taken
/// until its heartbeats are missed, for 20 s.
const SHARED_EMPTY_FOR: Duration = Duration::from_secs(30);
/// RabbitMQ takes back what a consumer has not acked for this long (its `consumer_timeout`,
/// 30 min), with a margin: nobody can hold a message unseen any longer.
const CONSUMER_HOLDS: Duration = Duration::from_secs(35 * 60);

/// Which of the two lanes of the healthy queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// What was confirmed a moment ago.
    Fresh,
    /// Everything that is due.
    Drain,
}

/// Whether a queue may be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It is not known to exist yet, for this reason.
    Undeclared(String),
    /// It may.
    Open,
    /// This flight has waited for long; nothing else is sent until it has landed.
    Slow(u64),
    /// It did not take what it was sent; it is tried with single messages.
    Probation(String),
}

#[derive(Debug)]
struct Queue {
    topic: String,
    max_in_queue: Option<u64>,
    health: Health,
    /// Messages that wait in RabbitMQ, as last seen.
    waiting: u64,
    /// Messages that went there since.
    sent_since: u64,
    /// Messages on their way.
    in_flight: u64,
    consumers: u32,
    /// When it was last looked at.
    seen_at: Duration,
    /// It is not looked at before.
    look_at: Duration,
    /// Since when every look found it empty.
    empty_since: Option<Duration>,
    /// Answers since the rate was brought up to date.
    answered: u64,
    /// Answers since the last look at the queue.
    answered_since: u64,
    /// Answers of which what drains has not had its half yet.
    to_halve: u64,
    /// When answers last came; before the first, when the queue was first seen.
    answered_at: Option<Duration>,
    /// Answers per second.
    rate: f64,
    /// Something may be due, for each lane.
    due: [bool; 2],
    /// Something may be due that has to be sent alone.
    alone: bool,
}

impl Queue {
    fn limit(&self) -> u64 {
        self.max_in_queue.unwrap_or_else(|| {
            // A rate is far below what a float cannot hold.
            ((self.rate * SECONDS_IN_QUEUE) as u64).max(LEAST_IN_QUEUE)
        })
    }

    /// What one of so many processes may send: each sees what waits, and not what the others
    /// send at the same moment.
    fn room(&self, processes: u32) -> u64 {
        let room = self.limit().saturating_sub(self.waiting) / u64::from(processes.max(1));
        room.saturating_sub(self.sent_since + self.in_flight)
    }

    /// What a lane may send. What drains fills the queue less, and answers make room for it at once,
    /// or what is sent between two looks at the queue would not last until the next one. While
    /// it waits, half of what is answered is kept for it, however full what is fresh keeps the
    /// queue: it must not wait for ever.
    fn room_for(&self, pace: Pace, processes: u32) -> u64 {
        let room = self.room(processes);
        let half = (self.to_halve / 2).min(room);
        match pace {
            Pace::Fresh if self.due[Pace::Drain as usize] => room - half,
            Pace::Fresh => room,
            Pace::Drain => {
                let ahead = self.waiting + self.sent_since + self.in_flight;
                let ahead = ahead.saturating_sub(self.answered_since);
                room.min(self.backlog_limit().saturating_sub(ahead).max(half))
            }
        }
    }

    /// What drains fills the queue up to.
    fn backlog_limit(&self) -> u64 {
        let limit = ((self.rate * SECONDS_OF_BACKLOG) as u64).max(LEAST_OF_BACKLOG);
        limit.min(self.limit() / 2).max(1)
    }

    /// Whether a claim of this lane has room for enough to be worth its statements.
    fn is_worth_a_claim(&self, pace: Pace, processes: u32) -> bool {
        let enough = match pace {
            Pace::Fresh => 1,
            Pace::Drain => WORTH_A_CLAIM.min(self.backlog_limit()),
        };
        self.room_for(pace, processes) >= enough
    }
}

/// What a look at a queue found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Messages that wait, without those that consumers hold.
    pub(super) waiting: u64,
    pub(super) consumers: u32,
}

/// What people are shown of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) consumers: u32,
    pub(super) waiting: u64,
    /// Why nothing is sent to it; empty if something is.
    pub(super) trouble: String,
}

/// The queues of the topology in force.
#[derive(Debug, Default)]
pub(super) struct Queues {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    queues: BTreeMap<String, Queue>,
    /// Who was served last, per lane; the next in order comes first.
    last: [String; 2],
    /// How many processes send to these queues and take answers, as last seen.
    processes: u32,
    /// How many have said that they are there, and which answers they took.
    announced: u32,
}

impl State {
    /// While one takes answers and does not say which, nobody knows who is silent.
    fn forget_silence(&mut self, now: Duration) {
        if self.processes > self.announced.max(1) {
            for queue in self.queues.values_mut() {
                queue.answered_at = Some(now);
            }
        }
    }
}

impl Queues {
    /// Follows the topology, and returns the names that are gone.
    pub(super) fn follow(&self, topology: &Topology) -> Vec<String> {
        let mut state = self.lock();
        let gone: Vec<String> = state
            .queues
            .keys()
            .filter(|name| !topology.subscriptions.contains_key(*name))
            .cloned()
            .collect();
        state
            .queues
            .retain(|name, _| topology.subscriptions.contains_key(name));
        for (name, subscription) in &topology.subscriptions {
            let queue = state.queues.entry(name.clone()).or_insert_with(|| Queue {
                topic: String::new(),
                max_in_queue: None,
                health: Health::Undeclared("not declared yet".to_owned()),
                waiting: 0,
                sent_since: 0,
                in_flight: 0,
                consumers: 0,
                seen_at: Duration::ZERO,
                look_at: Duration::ZERO,
                empty_since: None,
                answered: 0,
                answered_since: 0,
                to_halve: 0,
                answered_at: None,
                rate: 0.0,
                due: [true; 2],
                alone: true,
            });
            queue.topic.clone_from(&subscription.topic);
            queue.max_in_queue = subscription.max_in_queue;
        }
        gone
    }

    /// So many processes take answers, this one included.
    pub(super) fn shared_by(&self, processes: u32, now: Duration) {
        let mut state = self.lock();
        state.processes = processes;
        state.forget_silence(now);
    }

    /// Deliveries on these topics became due.
    pub(super) fn signal(&self, topics: &BTreeSet<String>) {
        for queue in self.lock().queues.values_mut() {
            if topics.contains(&queue.topic) {
                queue.due = [true; 2];
            }
        }
    }

    /// This is due. True if it is something.
    pub(super) fn look_at(&self, due: &Due) -> bool {
        let mut state = self.lock();
        for name in &due.to_send {
            if let Some(queue) = state.queues.get_mut(name) {
                queue.due = [true; 2];
            }
        }
        for name in &due.alone {
            if let Some(queue) = state.queues.get_mut(name) {
                queue.alone = true;
            }
        }
        !due.to_send.is_empty() || !due.alone.is_empty()
    }

    /// Everything is looked at again: signals are only latency.
    pub(super) fn look_again(&self) {
        for queue in self.lock().queues.values_mut() {
            queue.due = [true; 2];
            queue.alone = true;
        }
    }

    /// Whom this lane may claim for, in turn. Taking the turn clears the mark; [`Self::more`]
    /// sets it again.
    pub(super) fn turns(&self, pace: Pace) -> Vec<String> {
        let mut state = self.lock();
        let State {
            queues,
            last,
            processes,
            ..
        } = &mut *state;
        let last = &last[pace as usize];
        let mut turns: Vec<String> = Vec::new();
        let mut before = 0;
        for (name, queue) in queues.iter_mut() {
            if queue.health == Health::Open
                && queue.due[pace as usize]
                && queue.is_worth_a_claim(pace, *processes)
            {
                queue.due[pace as usize] = false;
                turns.push(name.clone());
                before += usize::from(name <= last);
            }
        }
        turns.rotate_left(before);
        turns
    }

    /// The turn ended here.
    pub(super) fn served(&self, pace: Pace, name: &str) {
        name.clone_into(&mut self.lock().last[pace as usize]);
    }

    /// There is more to claim than was taken.
    pub(super) fn more(&self, pace: Pace, name: &str) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            queue.due[pace as usize] = true;
        }
    }

    /// Something has to be sent alone.
    pub(super) fn alone_waits(&self, name: &str) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            queue.alone = true;
        }
    }

    /// Whose single messages are to be looked for; the mark is cleared.
    pub(super) fn alone(&self) -> Vec<String> {
        let mut state = self.lock();
        let processes = state.processes;
        let mut names = Vec::new();
        for (name, queue) in &mut state.queues {
            if queue.health == Health::Open && queue.room(processes) > 0 && queue.alone {
                queue.alone = false;
                names.push(name.clone());
            }
        }
        names
    }

    /// The queues that may be sent to, and what fits.
    pub(super) fn rooms(&self) -> Vec<(String, u64)> {
        let state = self.lock();
        let open = state.queues.iter();
        open.filter(|(_, queue)| queue.health == Health::Open)
            .map(|(name, queue)| (name.clone(), queue.room_for(Pace::Fresh, state.processes)))
            .collect()
    }

    /// Takes room for at most this many messages, before they are claimed: two lanes must not
    /// fill the same room. It is given back by [`Self::landed`].
    pub(super) fn reserve(&self, name: &str, most: usize) -> usize {
        self.reserve_for(Pace::Fresh, name, most)
    }

    /// The same of the room that a lane may fill.
    pub(super) fn reserve_for(&self, pace: Pace, name: &str, most: usize) -> usize {
        let mut state = self.lock();
        let processes = state.processes;
        let Some(queue) = state.queues.get_mut(name) else {
            return 0;
        };
        let granted = queue.room_for(pace, processes).min(most as u64);
        queue.in_flight += granted;
        usize::try_from(granted).unwrap_or(most)
    }

    /// A claim has brought so many of what its lane had reserved room for.
    pub(super) fn claimed(&self, pace: Pace, name: &str, reserved: usize, brought: usize) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            let unused = reserved.saturating_sub(brought) as u64;
            queue.in_flight = queue.in_flight.saturating_sub(unused);
            if pace == Pace::Drain {
                queue.to_halve = queue.to_halve.saturating_sub(2 * brought as u64);
            }
        }
    }

    /// Messages are not on their way any more; `sent` of them are in the queue.
    pub(super) fn landed(&self, name: &str, messages: u64, sent: u64) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            queue.in_flight = queue.in_flight.saturating_sub(messages);
            queue.sent_since += sent;
            if sent > 0 {
                queue.empty_since = None;
            }
        }
    }

    /// Answers were written. True if what drains may have waited for that.
    pub(super) fn answered(&self, name: &str, answers: usize, now: Duration) -> bool {
        let mut state = self.lock();
        let processes = state.processes;
        let Some(queue) = state.queues.get_mut(name) else {
            return false;
        };
        queue.answered += answers as u64;
        queue.answered_since += answers as u64;
        let most = (queue.rate as u64).max(LEAST_OF_BACKLOG);
        queue.to_halve = (queue.to_halve + answers as u64).min(most);
        queue.answered_at = Some(now);
        queue.due[Pace::Drain as usize] && queue.is_worth_a_claim(Pace::Drain, processes)
    }

    /// What all processes have heard.
    pub(super) fn heard(&self, heard: &Heard, now: Duration) {
        let mut state = self.lock();
        state.announced = heard.alive;
        for (name, _, ago) in &heard.answered {
            if let Some(queue) = state.queues.get_mut(name) {
                queue.answered_at = queue.answered_at.max(now.checked_sub(*ago));
            }
        }
        state.forget_silence(now);
    }

    /// Messages that are on their way.
    pub(super) fn in_flight(&self) -> u64 {
        let state = self.lock();
        state.queues.values().map(|queue| queue.in_flight).sum()
    }

    /// What a look found.
    pub(super) fn seen(&self, name: &str, seen: Seen, now: Duration) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            queue.waiting = seen.waiting;
            queue.sent_since = 0;
            queue.answered_since = 0;
            queue.consumers = seen.consumers;
            queue.seen_at = now;
            queue.answered_at.get_or_insert(now);
            queue.empty_since = match seen.waiting {
                0 if queue.in_flight == 0 => queue.empty_since.or(Some(now)),
                _ => None,
            };
        }
    }

    /// A look got no answer. The next one waits, because each keeps a channel until the queue
    /// answers.
    pub(super) fn silent(&self, name: &str, now: Duration) {
        if let Some(queue) = self.lock().queues.get_mut(name) {
            queue.look_at = now + SILENT_WAIT;
        }
    }

    /// Which queues to look at.
    pub(super) fn to_look_at(&self, now: Duration) -> Vec<String> {
        let state = self.lock();
        let due = state
            .queues
            .iter()
            .filter(|(_, queue)| queue.look_at <= now);
        due.map(|(name, _)| name.clone()).collect()
    }

    /// A second is over: the rate of answers is brought up to date.
    pub(super) fn tick(&self) {
        for queue in self.lock().queues.values_mut() {
            let answered = std::mem::take(&mut queue.answered) as f64;
            queue.rate += WEIGHT * (answered - queue.rate);
        }
    }

    /// The names of all queues whose health is so.
    pub(super) fn which(&self, so: impl Fn(&Health) -> bool) -> Vec<String> {
        let state = self.lock();
        let which = state.queues.iter().filter(|(_, queue)| so(&queue.health));
        which.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn is_open(&self, name: &str) -> bool {
        let state = self.lock();
        let queue = state.queues.get(name);
        queue.is_some_and(|queue| queue.health == Health::Open)
    }

    /// Changes the health of a queue if `from` says so. True if it did.
    pub(super) fn turn(&self, name: &str, from: impl Fn(&Health) -> bool, to: Health) -> bool {
        let mut state = self.lock();
        let Some(queue) = state.queues.get_mut(name) else {
            return false;
        };
        if !from(&queue.health) {
            return false;
        }
        if to == Health::Open {
            queue.due = [true; 2];
            queue.alone = true;
        }
        queue.health = to;
        true
    }

    /// Whether a message that was sent this long ago is not in the queue any more, nor with a
    /// consumer, nor its answer on the way. `silence` is longer than a handler may take: a
    /// consumer that is connected and answers nothing for so long has nothing to answer.
    pub(super) fn does_not_hold(
        &self,
        name: &str,
        sent_ago: Duration,
        silence: Duration,
        now: Duration,
    ) -> bool {
        let state = self.lock();
        let Some(queue) = state.queues.get(name) else {
            return false;
        };
        // A queue without a leader looks empty too; it does not confirm what it is sent, and so
        // is not open.
        let looked = queue.health == Health::Open && now.saturating_sub(queue.seen_at) < EMPTY_FOR;
        // What other processes have taken and not written is not seen from here. What they have
        // heard of a subscription is, and silence begins anew whenever one of them says nothing.
        let shared = state.processes.max(state.announced) > 1;
        let empty_for = if shared { SHARED_EMPTY_FOR } else { EMPTY_FOR };
        let empty = queue
            .empty_since
            .is_some_and(|since| now.saturating_sub(since) >= empty_for);
        let silent = sent_ago >= silence
            && queue
                .answered_at
                .is_some_and(|at| now.saturating_sub(at) >= silence);
        // A look does not see what consumers hold.
        looked && empty && (queue.consumers == 0 || silent || sent_ago >= CONSUMER_HOLDS)
    }

    pub(super) fn consumers(&self, name: &str) -> Option<u32> {
        self.lock().queues.get(name).map(|queue| queue.consumers)
    }

    pub(super) fn show(&self, name: &str) -> Option<Shown> {
        self.lock().queues.get(name).map(|queue| Shown {
            consumers: queue.consumers,
            waiting: queue.waiting,
            trouble: match &queue.health {
                Health::Open => String::new(),
                Health::Undeclared(why) | Health::Probation(why) => why.clone(),
                Health::Slow(_) => "waits for its publisher confirm".to_owned(),
            },
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves counters, which the next look replaces.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
