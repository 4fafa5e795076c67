//! How a program says what it consumes: source, subscription, inbox, options.

use std::time::Duration;

use sqlx::Pool;
use tokio_util::sync::CancellationToken;

use crate::dispatch;
use crate::error::Error;
use crate::handler::{BatchHandler, Handler, OneByOne};
use crate::inbox::InboxDatabase;
use crate::report::Report;
use crate::source::{Opener, Source};

/// The most deliveries that may be without a recorded answer.
pub const MAX_PREFETCH: u32 = 10_000;
/// The most messages of one transaction.
pub const MAX_BATCH: usize = 1_000;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The way in: `Consumer::connect(source).await?.subscription(…).inbox(…).run(…)`.
pub struct Consumer {
    opener: Opener,
}

impl Consumer {
    /// Reads the source's address. An address that cannot be read is an error; a service or
    /// broker that is not there yet is not, it is waited for.
    pub async fn connect(source: impl Into<Source>) -> Result<Self, Error> {
        Ok(Self {
            opener: source.into().opener()?,
        })
    }

    /// Names what is consumed: the topic and the subscription on it. If the service does not
    /// know them yet, they are waited for.
    pub fn subscription(
        self,
        topic: impl Into<String>,
        subscription: impl Into<String>,
    ) -> Subscription {
        Subscription {
            opener: self.opener,
            topic: topic.into(),
            subscription: subscription.into(),
        }
    }
}

/// A subscription that still needs an inbox.
pub struct Subscription {
    opener: Opener,
    topic: String,
    subscription: String,
}

impl Subscription {
    /// Puts the inbox into this database, which must be the one the handler writes to. The
    /// tables are made at the start.
    pub fn inbox<D: InboxDatabase>(self, pool: Pool<D>) -> Subscriber<D> {
        let consumer = format!("{}-{}", self.subscription, std::process::id());
        Subscriber {
            opener: self.opener,
            pool,
            options: Options {
                topic: self.topic,
                subscription: self.subscription,
                consumer,
                prefetch: 200,
                max_batch: 100,
                concurrency: D::CONCURRENCY,
                handler_timeout: Duration::from_secs(25),
                inbox_wait: Duration::from_secs(2),
                retention: 7 * DAY,
                drain_deadline: Duration::from_secs(25),
            },
        }
    }
}

/// Everything a consumer needs; each option has a default.
pub struct Subscriber<D: InboxDatabase> {
    opener: Opener,
    pool: Pool<D>,
    options: Options,
}

#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) topic: String,
    pub(crate) subscription: String,
    pub(crate) consumer: String,
    pub(crate) prefetch: u32,
    pub(crate) max_batch: usize,
    pub(crate) concurrency: usize,
    pub(crate) handler_timeout: Duration,
    pub(crate) inbox_wait: Duration,
    pub(crate) retention: Duration,
    pub(crate) drain_deadline: Duration,
}

impl<D: InboxDatabase> Subscriber<D> {
    /// A name for logs and people, at most 100 bytes; the subscription and the process id
    /// unless set.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.consumer = name.into();
        self
    }

    /// How many deliveries may be here without a recorded answer: 1 to 10,000, default 200.
    /// RabbitMQ gives one consumer of a quorum queue at most 2,000, so a larger number shows
    /// there as several consumers.
    #[must_use]
    pub fn prefetch(mut self, deliveries: u32) -> Self {
        self.options.prefetch = deliveries;
        self
    }

    /// How many messages a batch has at most: 1 to 1,000, default 100. A batch takes what is
    /// there and never waits to become full.
    #[must_use]
    pub fn max_batch(mut self, messages: usize) -> Self {
        self.options.max_batch = messages;
        self
    }

    /// How many transactions run at the same time: 1 to 1,000. Unless set it is 4 with
    /// PostgreSQL, whose pool should have a connection or two more than that, and 1 with
    /// SQLite, which has one writer.
    #[must_use]
    pub fn concurrency(mut self, transactions: usize) -> Self {
        self.options.concurrency = transactions;
        self
    }

    /// How long the handler may take for one transaction, default 25 s. It should be below
    /// the subscription's `resend_after`, or else each slow message is sent again.
    #[must_use]
    pub fn handler_timeout(mut self, limit: Duration) -> Self {
        self.options.handler_timeout = limit;
        self
    }

    /// How long a connection, the begin of a transaction and its inbox rows are waited for
    /// together, default 2 s. Then the messages are answered LATER.
    #[must_use]
    pub fn inbox_wait(mut self, limit: Duration) -> Self {
        self.options.inbox_wait = limit;
        self
    }

    /// How long the inbox remembers, default 7 days, at least 2 days. What was first sent
    /// longer ago, less a day, and is not in the inbox is rejected.
    #[must_use]
    pub fn retention(mut self, retention: Duration) -> Self {
        self.options.retention = retention;
        self
    }

    /// How long what was delivered is still worked on after the shutdown began, default 25 s.
    #[must_use]
    pub fn drain_deadline(mut self, limit: Duration) -> Self {
        self.options.drain_deadline = limit;
        self
    }

    /// Applies one message per transaction until `shutdown`.
    ///
    /// A service or database that is away is waited for. The result is an error only for what
    /// cannot heal: an option out of range, a database that is not durable, a schema newer
    /// than this program.
    pub async fn run<H: Handler<D>>(
        mut self,
        handler: H,
        shutdown: CancellationToken,
    ) -> Result<Report, Error> {
        self.options.max_batch = 1;
        self.run_batch(OneByOne(handler), shutdown).await
    }

    /// Applies several messages per transaction until `shutdown`; errors as for
    /// [`run`](Self::run).
    pub async fn run_batch<H: BatchHandler<D>>(
        self,
        handler: H,
        shutdown: CancellationToken,
    ) -> Result<Report, Error> {
        self.options.check()?;
        dispatch::run(self.opener, self.pool, self.options, handler, shutdown).await
    }
}

impl Options {
    fn check(&self) -> Result<(), Error> {
        let wrong = |name, value: String, range| Err(Error::Option { name, value, range });
        if !(1..=MAX_PREFETCH).contains(&self.prefetch) {
            return wrong(
                "prefetch",
                self.prefetch.to_string(),
                "1 to 10000 deliveries",
            );
        }
        if !(1..=MAX_BATCH).contains(&self.max_batch) {
            return wrong(
                "max_batch",
                self.max_batch.to_string(),
                "1 to 1000 messages",
            );
        }
        if !(1..=1_000).contains(&self.concurrency) {
            return wrong(
                "concurrency",
                self.concurrency.to_string(),
                "1 to 1000 transactions",
            );
        }
        if self.handler_timeout.is_zero() {
            return wrong("handler_timeout", "0".to_owned(), "more than 0");
        }
        if self.retention < 2 * DAY {
            return wrong(
                "retention",
                format!("{:?}", self.retention),
                "at least 2 days",
            );
        }
        let subscription = &self.subscription;
        if subscription.is_empty() || subscription.len() > 100 {
            return wrong("subscription", subscription.clone(), "1 to 100 bytes");
        }
        // Consuming one of these would eat answers.
        if ["acknowledge", "mark"].contains(&subscription.as_str()) {
            return wrong("subscription", subscription.clone(), "another name");
        }
        if self.consumer.is_empty() || self.consumer.len() > 100 {
            return wrong("name", self.consumer.clone(), "1 to 100 bytes");
        }
        Ok(())
    }

    /// What was first sent longer ago than this may have been forgotten: the retention less a
    /// day, so that a copy on its way at the limit is not applied twice.
    pub(crate) fn remembers(&self) -> Duration {
        self.retention.saturating_sub(DAY)
    }
}
