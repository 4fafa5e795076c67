//! What the service of a world is told: its file, with short timers.

use std::fmt::Write as _;

use crate::home::Home;

/// The configuration file of a world, in parts that a test can change.
#[derive(Clone, Debug)]
pub struct Config {
    /// Goes up with every change of the topology.
    pub version: u64,
    server: Vec<(String, String)>,
    producers: Vec<String>,
    topics: Vec<String>,
    /// Name and table.
    subscriptions: Vec<(String, String)>,
}

/// Timers that are as far apart as the real ones, only shorter.
const TIMERS: [(&str, &str); 7] = [
    ("publisher_confirm_ms", "1000"),
    ("lease_ms", "2000"),
    ("resend_after_ms", "3000"),
    ("passed_by_ms", "1000"),
    ("start_grace_ms", "1000"),
    ("check_call_ms", "2500"),
    ("shutdown_deadline_s", "5"),
];

/// After a prepare, the first check comes this much later.
pub const CHECK_AFTER_MS: u64 = 500;
/// A failed delivery waits this long.
pub const STEP_MS: u64 = 3_000;

impl Config {
    /// No producer, no topic, no subscription; the test timers.
    pub fn empty() -> Self {
        let timers = TIMERS.map(|(key, value)| (key.to_owned(), value.to_owned()));
        Self {
            version: 1,
            server: timers.into(),
            producers: Vec::new(),
            topics: Vec::new(),
            subscriptions: Vec::new(),
        }
    }

    /// The same, with the timers that a service has when nobody sets them.
    pub fn with_usual_timers() -> Self {
        Self {
            server: Vec::new(),
            ..Self::empty()
        }
    }

    /// Sets a key of `[server]` to a value as TOML writes it.
    #[must_use]
    pub fn server(mut self, key: &str, value: impl ToString) -> Self {
        self.server.retain(|(known, _)| known != key);
        self.server.push((key.to_owned(), value.to_string()));
        self
    }

    /// Adds a producer with a status endpoint, `host:port`.
    #[must_use]
    pub fn producer(mut self, name: &str, endpoint: impl std::fmt::Display) -> Self {
        self.producers.push(format!(
            "name = \"{name}\"\nstatus_endpoint = \"http://{endpoint}\"\n\
             check_after_ms = {CHECK_AFTER_MS}\n"
        ));
        self
    }

    /// Asks the producers so far this much later.
    #[must_use]
    pub fn check_after(mut self, ms: u64) -> Self {
        let usual = format!("check_after_ms = {CHECK_AFTER_MS}\n");
        for producer in &mut self.producers {
            *producer = producer.replace(&usual, &format!("check_after_ms = {ms}\n"));
        }
        self
    }

    /// Adds a producer that only publishes.
    #[must_use]
    pub fn publisher(mut self, name: &str) -> Self {
        self.producers.push(format!("name = \"{name}\"\n"));
        self
    }

    /// Adds a topic that every producer may use.
    #[must_use]
    pub fn topic(mut self, name: &str) -> Self {
        self.topics.push(format!("name = \"{name}\"\n"));
        self
    }

    /// Adds a topic that nobody need be subscribed to.
    #[must_use]
    pub fn topic_for_nobody(mut self, name: &str) -> Self {
        let table = format!("name = \"{name}\"\nmay_have_no_subscriber = true\n");
        self.topics.push(table);
        self
    }

    /// Adds a subscription with the usual attempts.
    #[must_use]
    pub fn subscription(self, name: &str, topic: &str) -> Self {
        self.subscription_with(name, topic, &format!("schedule_ms = [{STEP_MS}]"))
    }

    /// Adds a subscription that has nothing of its own.
    #[must_use]
    pub fn usual_subscription(self, name: &str, topic: &str) -> Self {
        self.subscription_with(name, topic, "")
    }

    /// Adds a subscription with more lines of its own.
    #[must_use]
    pub fn subscription_with(mut self, name: &str, topic: &str, lines: &str) -> Self {
        let table = format!("name = \"{name}\"\ntopic = \"{topic}\"\n{lines}\n");
        self.subscriptions.push((name.to_owned(), table));
        self
    }

    /// The file, for a service that lives there.
    pub(crate) fn text(&self, listen: &str, home: &Home) -> String {
        let mut text = format!(
            "topology_version = {}\n\n[server]\nlisten = \"{listen}\"\n",
            self.version
        );
        let store = home.address("service");
        let engines = match home.production() {
            None => format!("store = \"sqlite:{store}\"\n"),
            Some(production) => {
                for (name, _) in &self.subscriptions {
                    production.queue(name);
                }
                format!(
                    "store = \"{store}\"\nbroker = \"{}\"\ndeployment = \"{}\"\n",
                    home.service_amqp().unwrap_or_default(),
                    production.deployment()
                )
            }
        };
        text.push_str(&engines);
        for (key, value) in &self.server {
            writeln!(text, "{key} = {value}").expect("a string takes text");
        }
        let subscriptions: Vec<_> = self
            .subscriptions
            .iter()
            .map(|(_, table)| table.clone())
            .collect();
        for (kind, tables) in [
            ("producer", &self.producers),
            ("topic", &self.topics),
            ("subscription", &subscriptions),
        ] {
            for table in tables {
                write!(text, "\n[[{kind}]]\n{table}").expect("a string takes text");
            }
        }
        text
    }
}
