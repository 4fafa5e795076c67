//! The rules of `[[producer]]`, `[[topic]]` and `[[subscription]]`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::File;
use super::place::{Place, Wrong};
use crate::broker::rabbitmq::RESERVED;
use crate::message::limits;
use crate::message::{Attempts, CheckPolicy, DeliveryPolicy};
use crate::topology::{Producer, Subscription, Topic, Topology};

/// The most producers, topics and subscriptions, of each.
pub const MOST_PER_KIND: usize = 1_000;
/// The most steps of one schedule.
const MOST_STEPS: usize = 100;
/// The longest wait that may be written: 30 days.
const MOST_WAIT_MS: u64 = 30 * 24 * 3600 * 1000;
/// The longest `max_age_s`: ten years.
const MOST_AGE_S: u64 = 10 * 365 * 24 * 3600;
/// Versions and attempts are stored in signed columns.
const MOST_VERSION: u64 = i64::MAX as u64;
const MOST_ATTEMPTS: i64 = 1_000_000;
/// The most messages that may wait in one queue in RabbitMQ.
const MOST_IN_QUEUE: u64 = 10_000_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProducerTable {
    name: String,
    status_endpoint: Option<String>,
    check_after_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TopicTable {
    name: String,
    #[serde(default)]
    producers: Vec<String>,
    #[serde(default)]
    may_have_no_subscriber: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SubscriptionTable {
    name: String,
    topic: String,
    attempts: Option<WrittenAttempts>,
    schedule_ms: Option<Vec<u64>>,
    max_age_s: Option<u64>,
    max_in_queue: Option<u64>,
    amqp_user: Option<String>,
}

/// `attempts = 10` or `attempts = "unlimited"`.
#[derive(Clone, Copy, Debug)]
struct WrittenAttempts(Attempts);

impl<'de> Deserialize<'de> for WrittenAttempts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;

        impl Visitor<'_> for Written {
            type Value = WrittenAttempts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a number from 1 to {MOST_ATTEMPTS}, or \"unlimited\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
                u32::try_from(number)
                    .ok()
                    .filter(|_| (1..=MOST_ATTEMPTS).contains(&number))
                    .map(|number| WrittenAttempts(Attempts::Limited(number)))
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
                if word == "unlimited" {
                    Ok(WrittenAttempts(Attempts::Unlimited))
                } else {
                    Err(E::invalid_value(de::Unexpected::Str(word), &self))
                }
            }
        }

        deserializer.deserialize_any(Written)
    }
}

/// The topology of a file; `None` if it has none.
///
/// `with_amqp` says whether consumers can prove who they are.
pub(super) fn check(file: &File, with_amqp: bool) -> Result<Option<Topology>, Wrong> {
    let counts = [
        ("producer", file.producer.len()),
        ("topic", file.topic.len()),
        ("subscription", file.subscription.len()),
    ];
    for (kind, count) in counts {
        if count > MOST_PER_KIND {
            return Err(Wrong::new(
                [Place::Key(kind), Place::Item(MOST_PER_KIND)],
                format!("{count} tables [[{kind}]] are over the limit of {MOST_PER_KIND}"),
            ));
        }
    }
    let Some(version) = file.topology_version else {
        let Some((kind, _)) = counts.into_iter().find(|(_, count)| *count > 0) else {
            return Ok(None);
        };
        return Err(Wrong::new(
            [Place::Key(kind), Place::Item(0)],
            format!(
                "[[{kind}]] needs a topology_version; begin the file with topology_version = 1"
            ),
        ));
    };
    if !(1..=MOST_VERSION).contains(&version) {
        return Err(Wrong::new(
            [Place::Key("topology_version")],
            "topology_version: the first version is 1, and each change raises it",
        ));
    }
    let producers = producers(&file.producer)?;
    let topics = topics(&file.topic, &producers)?;
    let subscriptions = subscriptions(&file.subscription, &topics, with_amqp)?;
    Ok(Some(Topology {
        version,
        producers,
        topics,
        subscriptions,
    }))
}

/// One table that is being checked: what its errors are called and where they are.
struct Table<'a> {
    kind: &'static str,
    index: usize,
    name: &'a str,
}

impl Table<'_> {
    fn wrong(&self, key: &'static str, what: impl fmt::Display) -> Wrong {
        Wrong::new(
            [
                Place::Key(self.kind),
                Place::Item(self.index),
                Place::Key(key),
            ],
            format!("{} `{}`: {key} {what}", self.kind, shown(self.name)),
        )
    }

    fn check_name<T>(&self, taken: &BTreeMap<String, T>) -> Result<(), Wrong> {
        limits::name("name", self.name).map_err(|invalid| self.wrong("name", invalid.reason))?;
        if taken.contains_key(self.name) {
            return Err(self.wrong("name", "is there twice"));
        }
        Ok(())
    }

    fn span(
        &self,
        key: &'static str,
        value: u64,
        most: u64,
        unit: fn(u64) -> Duration,
    ) -> Result<Duration, Wrong> {
        if (1..=most).contains(&value) {
            Ok(unit(value))
        } else {
            Err(self.wrong(key, format!("{value} is not between 1 and {most}")))
        }
    }
}

/// A name for a line of text, whatever it holds.
fn shown(name: &str) -> String {
    name.chars()
        .take(limits::NAME_BYTES)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn producers(tables: &[ProducerTable]) -> Result<BTreeMap<String, Producer>, Wrong> {
    let mut checked = BTreeMap::new();
    for (index, written) in tables.iter().enumerate() {
        let table = Table {
            kind: "producer",
            index,
            name: &written.name,
        };
        table.check_name(&checked)?;
        let mut producer = Producer::default();
        if let Some(endpoint) = &written.status_endpoint {
            check_endpoint(endpoint).map_err(|what| table.wrong("status_endpoint", what))?;
            producer.status_endpoint = Some(endpoint.clone());
        }
        if let Some(ms) = written.check_after_ms {
            producer.checks = CheckPolicy {
                check_after: table.span(
                    "check_after_ms",
                    ms,
                    MOST_WAIT_MS,
                    Duration::from_millis,
                )?,
            };
        }
        checked.insert(written.name.clone(), producer);
    }
    Ok(checked)
}

/// An endpoint is scheme, host and port: a path would be ignored, and a user's name or
/// password would end in logs.
fn check_endpoint(endpoint: &str) -> Result<(), String> {
    const EXAMPLE: &str = "use for example http://127.0.0.1:7411";
    let uri: tonic::transport::Uri = endpoint
        .parse()
        .map_err(|error| format!("is not a URL ({error}); {EXAMPLE}"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(format!("with https:// is not supported yet; {EXAMPLE}")),
        Some(_) | None => return Err(format!("does not begin with http://; {EXAMPLE}")),
    }
    let Some(authority) = uri.authority() else {
        return Err(format!("has no host; {EXAMPLE}"));
    };
    if authority.as_str().contains('@') {
        return Err(format!(
            "has a user name, which is not supported; {EXAMPLE}"
        ));
    }
    if authority.host().is_empty() {
        return Err(format!("has no host; {EXAMPLE}"));
    }
    if authority.port_u16().is_none_or(|port| port == 0) {
        return Err(format!("has no port; {EXAMPLE}"));
    }
    if uri
        .path_and_query()
        .is_some_and(|path| path.as_str() != "/")
    {
        return Err(format!("has a path, which would be ignored; {EXAMPLE}"));
    }
    Ok(())
}

fn topics(
    tables: &[TopicTable],
    producers: &BTreeMap<String, Producer>,
) -> Result<BTreeMap<String, Topic>, Wrong> {
    let mut checked = BTreeMap::new();
    for (index, written) in tables.iter().enumerate() {
        let table = Table {
            kind: "topic",
            index,
            name: &written.name,
        };
        table.check_name(&checked)?;
        let mut topic = Topic {
            producers: BTreeSet::new(),
            may_have_no_subscriber: written.may_have_no_subscriber,
        };
        for producer in &written.producers {
            let name = shown(producer);
            if !producers.contains_key(producer) {
                return Err(table.wrong(
                    "producers",
                    format!("names `{name}`, but there is no [[producer]] with that name"),
                ));
            }
            if !topic.producers.insert(producer.clone()) {
                return Err(table.wrong("producers", format!("names `{name}` twice")));
            }
        }
        checked.insert(written.name.clone(), topic);
    }
    Ok(checked)
}

fn subscriptions(
    tables: &[SubscriptionTable],
    topics: &BTreeMap<String, Topic>,
    with_amqp: bool,
) -> Result<BTreeMap<String, Subscription>, Wrong> {
    let mut checked = BTreeMap::new();
    for (index, written) in tables.iter().enumerate() {
        let table = Table {
            kind: "subscription",
            index,
            name: &written.name,
        };
        table.check_name(&checked)?;
        if !topics.contains_key(&written.topic) {
            return Err(table.wrong(
                "topic",
                format!(
                    "names `{}`, but there is no [[topic]] with that name",
                    shown(&written.topic)
                ),
            ));
        }
        if RESERVED.contains(&written.name.as_str()) {
            return Err(table.wrong("name", "is the name of a queue of Handfast's own"));
        }
        if let Some(most) = written.max_in_queue
            && !(1..=MOST_IN_QUEUE).contains(&most)
        {
            return Err(table.wrong(
                "max_in_queue",
                format!("{most} is not between 1 and {MOST_IN_QUEUE} messages"),
            ));
        }
        if let Some(user) = &written.amqp_user {
            limits::name("amqp_user", user)
                .map_err(|invalid| table.wrong("amqp_user", invalid.reason))?;
            if !with_amqp {
                let what = "needs [server] broker = \"amqp://…\": the embedded broker does not \
                            know who answers";
                return Err(table.wrong("amqp_user", what));
            }
        }
        let subscription = Subscription {
            topic: written.topic.clone(),
            policy: policy(&table, written)?,
            max_in_queue: written.max_in_queue,
            amqp_user: written.amqp_user.clone(),
        };
        checked.insert(written.name.clone(), subscription);
    }
    Ok(checked)
}

fn policy(table: &Table<'_>, written: &SubscriptionTable) -> Result<DeliveryPolicy, Wrong> {
    let mut policy = DeliveryPolicy::default();
    if let Some(WrittenAttempts(attempts)) = written.attempts {
        policy.attempts = attempts;
    }
    if let Some(steps) = &written.schedule_ms {
        if steps.is_empty() || steps.len() > MOST_STEPS {
            return Err(table.wrong(
                "schedule_ms",
                format!(
                    "has {} steps; it needs 1 to {MOST_STEPS}, and the last one repeats",
                    steps.len()
                ),
            ));
        }
        policy.schedule = steps
            .iter()
            .map(|ms| table.span("schedule_ms", *ms, MOST_WAIT_MS, Duration::from_millis))
            .collect::<Result<_, _>>()?;
    }
    if let Some(age) = written.max_age_s {
        policy.max_age = Some(table.span("max_age_s", age, MOST_AGE_S, Duration::from_secs)?);
    }
    Ok(policy)
}
