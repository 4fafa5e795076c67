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
