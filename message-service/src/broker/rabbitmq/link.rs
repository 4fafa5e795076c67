//! One supervised connection: it is opened again for ever, and everybody sees whether it is
//! there, blocked, or why not.
//!
//! Publishing, probation, looking and consuming have a link each, because RabbitMQ stops
//! reading a connection as a whole. lapin's own recovery is off: it has one address, gives up,
//! and knows nothing of what was in flight.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, Event};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::error::{Error, text};

/// How long a connection may take to be opened, and a channel or a close on it.
pub(super) const STEP: Duration = Duration::from_secs(4);
/// The wait after the first failed try; it doubles.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// The longest wait between two tries: with [`STEP`] well below the 10 s in which everything
/// has to go on after RabbitMQ is back.
const SLOWEST_RETRY: Duration = Duration::from_secs(2);
/// Missing twice in a row, the connection is over.
const HEARTBEAT_S: u16 = 10;
/// The first bytes of every client.
const PROTOCOL_HEADER: &[u8] = b"AMQP\0\0\x09\x01";
/// How often the connection is looked at besides its events.
const LOOK: Duration = Duration::from_secs(1);

/// Where RabbitMQ is, checked: one or several nodes of one cluster.
#[derive(Clone)]
pub struct Addresses(Vec<AMQPUri>);

impl Addresses {
    /// Reads a list of URLs, separated by commas. The error is one line and shows no password.
    pub fn parse(urls: &str) -> Result<Self, String> {
        let read = |url: &str| -> Result<AMQPUri, String> {
            let mut uri: AMQPUri = url.trim().parse().map_err(|_| {
                "is not an AMQP URL; use for example amqp://user:password@127.0.0.1:5672/%2f"
                    .to_owned()
            })?;
            if uri.scheme != AMQPScheme::AMQP {
                return Err("amqps:// is not supported yet; use amqp://".to_owned());
            }
            uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
            Ok(uri)
        };
        urls.split(',')
            .map(read)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The addresses without passwords, for people.
    pub fn shown(&self) -> String {
        let one = |uri: &AMQPUri| format!("{}:{}", uri.authority.host, uri.authority.port);
        self.0.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Debug for Addresses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown())
    }
}

impl PartialEq for Addresses {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Addresses {}

/// What a link is at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// There is no connection, for this reason.
    Down(String),
    /// Everything may go.
    Up,
    /// RabbitMQ reads nothing from it, for this reason.
    Blocked(String),
}

/// An open connection. It is replaced as a whole.
pub(super) struct Opened {
    connection: Connection,
    /// Ends this connection, when its user knows that it is of no use any more.
    given_up: CancellationToken,
}

impl Opened {
    /// A new channel, in a bounded time. A connection that gives none is of no use: it does not
    /// answer, or it is full of channels that a silent queue keeps from closing.
    pub(super) async fn channel(&self) -> Result<Channel, Error> {
        let opened = timeout(STEP, self.connection.create_channel()).await;
        if !matches!(opened, Ok(Ok(_))) {
            self.give_up();
        }
        match opened {
            Ok(channel) => Ok(channel?),
            Err(_) => Err(Error::timed_out("open a channel", STEP)),
        }
    }

    /// Says that nothing can be done with it any more; the supervisor opens another.
    pub(super) fn give_up(&self) {
        self.given_up.cancel();
    }

    /// Completes when the connection is of no use any more.
    pub(super) async fn gone(&self) {
        self.given_up.cancelled().await;
    }

    pub(super) fn is_connected(&self) -> bool {
        !self.given_up.is_cancelled() && self.connection.status().connected()
    }
}

/// A supervised connection.
pub(super) struct Link {
    purpose: &'static str,
    addresses: Addresses,
    opened: watch::Sender<Option<Arc<Opened>>>,
    state: watch::Sender<LinkState>,
}

impl Link {
    pub(super) fn new(purpose: &'static str, addresses: Addresses) -> Arc<Self> {
        Arc::new(Self {
            purpose,
            addresses,
            opened: watch::Sender::new(None),
            state: watch::Sender::new(LinkState::Down("not connected yet".to_owned())),
        })
    }

    /// What it is now.
    pub(super) fn state(&self) -> LinkState {
        self.state.borrow().clone()
    }

    pub(super) fn is_up(&self) -> bool {
        *self.state.borrow() == LinkState::Up
    }

    pub(super) fn is_blocked(&self) -> bool {
        matches!(*self.state.borrow(), LinkState::Blocked(_))
    }

    /// Waits for a connection that is open and not blocked. It may be gone a moment later.
    pub(super) async fn ready(&self) -> Arc<Opened> {
        let mut state = self.state.subscribe();
        loop {
            // The sender lives in `self`, so waiting cannot fail.
            let _ = state.wait_for(|state| *state == LinkState::Up).await;
            let opened = self.opened.borrow().clone();
            match opened.filter(|opened| opened.is_connected()) {
                Some(opened) => return opened,
                None => tokio::time::sleep(FIRST_RETRY).await,
            }
        }
    }

    /// Opens and opens again until `stop`, then closes.
    pub(super) async fn run(self: Arc<Self>, seed: u64, stop: CancellationToken) {
        let mut chance = StdRng::seed_from_u64(seed);
        let mut wait = FIRST_RETRY;
        let mut address = 0;
        let mut silent = false;
        loop {
            let uri = self.addresses.0[address % self.addresses.0.len()].clone();
            address += 1;
            let opening = self.open(uri, &mut silent);
            let opened = tokio::select! {
                opened = opening => opened,
                () = stop.cancelled() => return,
            };
            match opened {
                Ok(connection) => {
                    wait = FIRST_RETRY;
                    // The same node again, if it was good.
                    address -= 1;
                    self.serve(connection, &stop).await;
                }
                Err(error) => self.down(&error.to_string()),
            }
            if stop.is_cancelled() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(wait.mul_f64(chance.random_range(0.5..=1.0))) => {}
                () = stop.cancelled() => return,
            }
            wait = (wait * 2).min(SLOWEST_RETRY);
        }
    }

    async fn open(&self, uri: AMQPUri, silent: &mut bool) -> Result<Connection, Error> {
        // A handshake that is given up leaves a thread of lapin behind until RabbitMQ goes on. So
        // while it does not answer, it is looked at without lapin.
        if *silent {
            knock(&uri.authority.host, uri.authority.port).await?;
        }
        let name = format!("handfast {}", self.purpose);
        let options = ConnectionProperties::default().with_connection_name(name.into());
        let connected = timeout(STEP, Connection::connect_uri(uri, options)).await;
        *silent = connected.is_err();
        match connected {
            Ok(connection) => Ok(connection?),
            Err(_) => Err(Error::timed_out("connect", STEP)),
        }
    }

    /// Shows the connection to everybody until it is over.
    async fn serve(&self, connection: Connection, stop: &CancellationToken) {
        let mut events = Box::pin(connection.events_listener());
        let opened = Arc::new(Opened {
            connection,
            given_up: CancellationToken::new(),
        });
        self.opened.send_replace(Some(Arc::clone(&opened)));
        self.up();
        let mut look = tokio::time::interval(LOOK);
        let why = loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::ConnectionBlocked(reason)) => self.blocked(reason),
                    Some(Event::ConnectionUnblocked) => self.up(),
                    // lapin also tells here of a channel that RabbitMQ closed; its user knows, and
                    // the others have nothing to do with it.
                    Some(Event::Error(error)) if !opened.connection.status().connected() => {
                        break text(&error);
                    }
                    Some(_) => {}
                    None => break "the connection ended".to_owned(),
                },
                _ = look.tick() => if !opened.connection.status().connected() {
                    break "the connection ended".to_owned();
                },
                () = opened.gone() => break "it did not answer any more".to_owned(),
                () = stop.cancelled() => break "the service stops".to_owned(),
            }
        };
        opened.give_up();
        self.opened.send_replace(None);
        self.down(&why);
        // A server that does not answer is not waited for; the socket goes with its last user.
        let close = opened.connection.close(200, "bye".into());
        let _ = timeout(LOOK, close).await;
    }

    fn up(&self) {
        let before = self.state.send_replace(LinkState::Up);
        match before {
            LinkState::Up => {}
            LinkState::Down(_) => {
                tracing::info!(
                    link = self.purpose,
                    "RabbitMQ link `{}` is open",
                    self.purpose
                );
            }
            LinkState::Blocked(_) => {
                tracing::info!(
                    link = self.purpose,
                    "RabbitMQ reads `{}` again",
                    self.purpose
                );
            }
        }
    }

    fn blocked(&self, reason: String) {
        tracing::warn!(
            link = self.purpose,
            reason,
            "RabbitMQ blocks `{}`: {reason}; nothing is sent until it is over",
            self.purpose
        );
        self.state.send_replace(LinkState::Blocked(reason));
    }

    fn down(&self, why: &str) {
        let next = LinkState::Down(why.to_owned());
        let before = self.state.send_replace(next.clone());
        if before != next && why != "the service stops" {
            tracing::warn!(
                link = self.purpose,
                addresses = self.addresses.shown(),
                reason = why,
                "RabbitMQ link `{}` is down and is opened again: {why}",
                self.purpose
            );
        }
    }
}

/// Sees whether an AMQP server answers at all.
async fn knock(host: &str, port: u16) -> Result<(), Error> {
    let knocking = async {
        let mut door = TcpStream::connect((host, port)).await?;
        door.write_all(PROTOCOL_HEADER).await?;
        door.read_u8().await
    };
    match timeout(STEP, knocking).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(lapin::Error::from(error).into()),
        Err(_) => Err(Error::timed_out("connect", STEP)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_without_passwords() {
        let addresses =
            Addresses::parse("amqp://me:secret@one:5672/%2f, amqp://me:secret@two/shop").unwrap();
        assert_eq!(addresses.shown(), "one:5672, two:5672");
        assert!(!format!("{addresses:?}").contains("secret"));
        assert_eq!(addresses.0[0].query.heartbeat, Some(HEARTBEAT_S));
        for wrong in [
            "",
            "amqp://me:secret@one,",
            "http://one",
            "amqps://me:secret@one",
        ] {
            let why = Addresses::parse(wrong).unwrap_err();
            assert!(!why.contains("secret") && why.lines().count() == 1, "{why}");
        }
    }
}
