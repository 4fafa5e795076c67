//! Who produces what for whom in every run.

use std::collections::BTreeMap;

use handfast_service::topology::{Producer, Subscription, Topic, Topology};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

pub(crate) const PRODUCER: &str = "source";
pub(crate) const TOPIC: &str = "fact";
/// The subscription that nobody consumes, where there is one.
pub(crate) const ASLEEP: &str = "asleep";
/// No run has more that are consumed.
pub(crate) const MOST_SUBSCRIPTIONS: u32 = 16;
/// Nobody answers there. What is prepared is confirmed long before anybody would be asked.
const STATUS: &str = "http://127.0.0.1:1";

/// The names of so many subscriptions.
pub(crate) fn subscriptions(count: u32) -> Vec<String> {
    (1..=count).map(|number| format!("sink-{number}")).collect()
}

/// A payload of so many bytes, the same each time. Nothing compresses it: a database that stored less
/// than it was given would make large ones look cheap.
pub(crate) fn payload(bytes: usize) -> Vec<u8> {
    let mut payload = vec![0; bytes];
    StdRng::seed_from_u64(42).fill_bytes(&mut payload);
    payload
}

/// The topology, for who has no service.
pub(crate) fn topology(subscriptions: &[String]) -> Topology {
    let producer = Producer {
        status_endpoint: Some(STATUS.to_owned()),
        ..Producer::default()
    };
    let subscription = |name: &String| {
        let subscription = Subscription {
            topic: TOPIC.to_owned(),
            policy: handfast_service::message::DeliveryPolicy::default(),
            max_in_queue: None,
            amqp_user: None,
        };
        (name.clone(), subscription)
    };
    Topology {
        version: 1,
        producers: BTreeMap::from([(PRODUCER.to_owned(), producer)]),
        topics: BTreeMap::from([(TOPIC.to_owned(), Topic::default())]),
        subscriptions: subscriptions.iter().map(subscription).collect(),
    }
}

/// The same as a file's tables.
pub(crate) fn tables(subscriptions: &[String]) -> String {
    let mut text = format!(
        "[[producer]]\nname = \"{PRODUCER}\"\nstatus_endpoint = \"{STATUS}\"\n\n\
         [[topic]]\nname = \"{TOPIC}\"\n"
    );
    for name in subscriptions {
        text.push_str(&format!(
            "\n[[subscription]]\nname = \"{name}\"\ntopic = \"{TOPIC}\"\n"
        ));
    }
    text
}
