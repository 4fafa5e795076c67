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
mod tests {
    use super::*;
    use crate::message::DeliveryPolicy;
    use crate::topology::Subscription;

    const SECOND: Duration = Duration::from_secs(1);

    fn queues(names: &[&str]) -> Queues {
        let queues = Queues::default();
        queues.follow(&topology(names));
        for name in names {
            queues.turn(name, |_| true, Health::Open);
        }
        queues
    }

    fn topology(names: &[&str]) -> Topology {
        let subscription = |max_in_queue| Subscription {
            topic: "payment.completed".into(),
            policy: DeliveryPolicy::default(),
            max_in_queue,
            amqp_user: None,
        };
        let named = |name: &&str| {
            (
                (*name).to_owned(),
                subscription((*name == "b").then_some(7)),
            )
        };
        Topology {
            version: 1,
            producers: BTreeMap::new(),
            topics: BTreeMap::new(),
            subscriptions: names.iter().map(named).collect(),
        }
    }

    #[test]
    fn turns_go_round() {
        let queues = queues(&["a", "b", "c"]);
        assert_eq!(queues.turns(Pace::Fresh), ["a", "b", "c"]);
        queues.served(Pace::Fresh, "a");
        queues.look_again();
        assert_eq!(queues.turns(Pace::Fresh), ["b", "c", "a"]);
        assert_eq!(queues.turns(Pace::Drain), ["a", "b", "c"]);
        assert!(
            queues.turns(Pace::Fresh).is_empty(),
            "until something is due"
        );
        queues.more(Pace::Fresh, "c");
        assert_eq!(queues.turns(Pace::Fresh), ["c"]);
    }

    #[test]
    fn a_queue_holds_no_more_than_its_limit() {
        let queues = queues(&["a", "b"]);
        assert_eq!(queues.reserve("a", 20_000), 10_000);
        assert_eq!(queues.reserve("b", 3), 3);
        assert_eq!(queues.reserve("b", 20), 4);
        assert_eq!(queues.reserve("b", 20), 0);
        queues.landed("b", 3, 3);
        queues.landed("b", 4, 0);
        assert_eq!(queues.reserve("b", 20), 4, "three are in the queue");
        queues.landed("b", 4, 0);
        let seen = |waiting| Seen {
            waiting,
            consumers: 1,
        };
        queues.seen("b", seen(2), SECOND);
        assert_eq!(queues.reserve("b", 20), 5);
        queues.landed("b", 5, 0);
        queues.seen("b", seen(7), SECOND);
        queues.look_again();
        assert_eq!(
            queues.turns(Pace::Drain),
            Vec::<String>::new(),
            "both are full"
        );
    }

    #[test]
    fn a_quick_subscription_may_have_more_in_its_queue() {
        let queues = queues(&["a"]);
        for _ in 0..50 {
            queues.answered("a", 10_000, SECOND);
            queues.tick();
        }
        assert_eq!(queues.turns(Pace::Drain), ["a"], "nothing waits for a turn");
        let room = queues.reserve("a", 100_000);
        assert!((49_000..=50_000).contains(&room), "{room}");
    }

    #[test]
    fn what_drains_leaves_room_for_what_is_fresh_and_answers_make_room_at_once() {
        let queues = queues(&["a"]);
        let drain = |most| queues.reserve_for(Pace::Drain, "a", most);
        assert_eq!(drain(5_000), 2_000);
        queues.landed("a", 2_000, 2_000);
        assert_eq!(drain(1), 0);
        assert_eq!(queues.turns(Pace::Drain), Vec::<String>::new());
        assert_eq!(queues.reserve("a", 20_000), 8_000, "fresh ones may go");
        queues.landed("a", 8_000, 0);
        assert!(!queues.answered("a", 40, SECOND), "not worth a claim");
        assert!(queues.answered("a", 260, SECOND), "it waits for room");
        assert_eq!(queues.turns(Pace::Drain), ["a"]);
        assert_eq!(drain(5_000), 300);
        queues.claimed(Pace::Drain, "a", 300, 200);
        queues.landed("a", 200, 200);
        assert!(!queues.answered("a", 100, SECOND), "it had its turn");
        queues.seen("a", seen(1_900), SECOND);
        assert_eq!(drain(5_000), 100, "a look at the queue knows better");
    }

    #[test]
    fn what_drains_has_half_of_the_answers_while_what_is_fresh_keeps_the_queue_full() {
        let queues = queues(&["a"]);
        queues.seen("a", seen(10_000), SECOND);
        let (mut drained, mut fresh) = (0, 0);
        for second in 2..=11 {
            queues.answered("a", 500, second * SECOND);
            queues.seen("a", seen(10_000 - 500), second * SECOND);
            // What is fresh comes first, and takes all that it may.
            let first = queues.reserve("a", 1_000);
            let then = queues.reserve_for(Pace::Drain, "a", 1_000);
            assert_eq!(first + then, 500);
            queues.claimed(Pace::Drain, "a", then, then);
            queues.landed("a", 500, 500);
            (drained, fresh) = (drained + then, fresh + first);
        }
        assert_eq!((drained, fresh), (2_500, 2_500));
    }

    #[test]
    fn what_drains_fills_a_small_queue_by_half() {
        let queues = queues(&["b"]);
        assert_eq!(queues.turns(Pace::Drain), ["b"]);
        assert_eq!(queues.reserve_for(Pace::Drain, "b", 20), 3);
        assert_eq!(queues.reserve("b", 20), 4);
    }

    fn seen(waiting: u64) -> Seen {
        Seen {
            waiting,
            consumers: 1,
        }
    }

    #[test]
    fn what_is_not_open_gets_no_turn_and_says_why() {
        let queues = queues(&["a", "b"]);
        queues.turn("a", |_| true, Health::Probation("full".into()));
        assert_eq!(queues.turns(Pace::Fresh), ["b"]);
        assert_eq!(queues.show("a").unwrap().trouble, "full");
        assert_eq!(queues.show("b").unwrap().trouble, "");
        assert!(!queues.turn("a", |health| *health == Health::Open, Health::Slow(1)));
    }

    #[test]
    fn a_message_is_gone_only_if_nobody_can_hold_it() {
        let queues = queues(&["a"]);
        let seen = |waiting, consumers| Seen { waiting, consumers };
        let gone = |ago, now| queues.does_not_hold("a", ago, 90 * SECOND, now);
        assert!(!gone(SECOND, SECOND), "never looked");
        queues.seen("a", seen(0, 0), SECOND);
        assert!(!gone(60 * SECOND, 2 * SECOND), "not empty for long");
        assert!(!gone(60 * SECOND, 9 * SECOND), "not looked at lately");
        queues.seen("a", seen(0, 0), 8 * SECOND);
        assert!(gone(60 * SECOND, 9 * SECOND));
        queues.seen("a", seen(0, 1), 9 * SECOND);
        assert!(!gone(60 * SECOND, 10 * SECOND), "a consumer may hold it");
        assert!(gone(CONSUMER_HOLDS, 10 * SECOND));
        queues.seen("a", seen(0, 1), 99 * SECOND);
        assert!(
            gone(95 * SECOND, 100 * SECOND),
            "it would have been answered"
        );
        queues.answered("a", 1, 99 * SECOND);
        assert!(
            !gone(95 * SECOND, 100 * SECOND),
            "it may come after this one"
        );
        queues.seen("a", seen(1, 0), 10 * SECOND);
        assert!(!gone(CONSUMER_HOLDS, 20 * SECOND));
    }

    #[test]
    fn what_other_processes_may_have_heard_is_not_taken_for_silence() {
        let queues = queues(&["a"]);
        let gone = |now| queues.does_not_hold("a", 120 * SECOND, 90 * SECOND, now);
        let see = |consumers, now| {
            let waiting = 0;
            queues.seen("a", Seen { waiting, consumers }, now);
        };
        let heard = |alive, ago| Heard {
            topology_version: 1,
            alive,
            answered: vec![("a".to_owned(), None, ago)],
        };
        let away = 1_000 * SECOND;
        queues.shared_by(2, SECOND);
        queues.heard(&heard(2, away), SECOND);
        see(1, SECOND);
        see(1, 100 * SECOND);
        assert!(
            gone(100 * SECOND),
            "all of them say that they had no answer"
        );
        queues.heard(&heard(2, 20 * SECOND), 100 * SECOND);
        assert!(!gone(100 * SECOND), "one of them had");
        see(1, 171 * SECOND);
        assert!(gone(171 * SECOND));
        queues.heard(&heard(1, away), 171 * SECOND);
        assert!(!gone(171 * SECOND), "one of them says nothing");
        queues.heard(&heard(2, away), 172 * SECOND);
        see(1, 200 * SECOND);
        assert!(!gone(200 * SECOND), "what it had then is not known");
        see(1, 261 * SECOND);
        assert!(gone(261 * SECOND));
        queues.shared_by(3, 261 * SECOND);
        assert!(!gone(261 * SECOND), "the third has said nothing yet");

        queues.shared_by(1, 262 * SECOND);
        queues.heard(&heard(1, away), 262 * SECOND);
        queues.landed("a", 1, 1);
        see(0, 272 * SECOND);
        see(0, 280 * SECOND);
        assert!(gone(280 * SECOND));
        queues.shared_by(2, 280 * SECOND);
        assert!(!gone(280 * SECOND), "others may hold its answers");
        queues.shared_by(1, 280 * SECOND);
        queues.heard(&heard(2, away), 280 * SECOND);
        assert!(
            !gone(280 * SECOND),
            "and those that take none at the moment"
        );
        see(0, 302 * SECOND);
        assert!(gone(302 * SECOND));
    }

    #[test]
    fn several_processes_share_the_room() {
        let queues = queues(&["b"]);
        queues.shared_by(2, SECOND);
        assert_eq!(queues.reserve("b", 20), 3);
        queues.landed("b", 3, 3);
        assert_eq!(queues.reserve("b", 20), 0, "the others have the rest");
        let seen = Seen {
            waiting: 5,
            consumers: 1,
        };
        queues.seen("b", seen, SECOND);
        assert_eq!(queues.reserve("b", 20), 1);
    }

    #[test]
    fn a_removed_subscription_is_named_once() {
        let queues = queues(&["a", "b"]);
        assert_eq!(queues.follow(&topology(&["a"])), ["b"]);
        assert!(queues.follow(&topology(&["a"])).is_empty());
    }
}
