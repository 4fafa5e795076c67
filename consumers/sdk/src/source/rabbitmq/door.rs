//! Connects to one of RabbitMQ's addresses, and names what goes wrong with it.

use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, Event};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::address::Address;
use super::{CLOSE_TIMEOUT, COMMAND_TIMEOUT};

/// For a connection, its handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// What an AMQP client says first; the server answers at once.
const PROTOCOL_HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";

/// What was met. The kind tells one incident from another.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) kind: Kind,
    pub(super) reason: String,
    /// True if the connection is of no use any more.
    pub(super) fatal: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// There is no connection.
    Away,
    /// It is connected and does not answer.
    Silent,
    /// It does not take what is published.
    Blocked,
    /// It answered with this reply code.
    Refused(u16),
    /// It ended the consumer.
    Cancelled,
    /// There is no queue for answers.
    Returned,
    /// It did not take an answer.
    Nacked,
}

impl Trouble {
    /// One after which the connection is still good.
    pub(super) fn passing(kind: Kind, reason: &str) -> Self {
        Self {
            kind,
            reason: reason.to_owned(),
            fatal: false,
        }
    }

    pub(super) fn silent(what: &str) -> Self {
        Self {
            kind: Kind::Silent,
            reason: format!("no answer to {what}"),
            fatal: true,
        }
    }
}

impl From<lapin::Error> for Trouble {
    fn from(error: lapin::Error) -> Self {
        match error.kind() {
            ErrorKind::ProtocolError(reply) => Self {
                kind: Kind::Refused(reply.get_id()),
                reason: reply.get_message().to_string(),
                fatal: !error.is_amqp_soft_error(),
            },
            _ => Self {
                kind: Kind::Away,
                reason: error.to_string(),
                fatal: true,
            },
        }
    }
}

/// The addresses, and which of them is in use.
pub(super) struct Door {
    addresses: Vec<Address>,
    current: usize,
    /// The name of the connections, for people at RabbitMQ.
    name: String,
    /// The last try failed, so the next one is another address's turn.
    failed: bool,
    /// The last try met an address that let us in and then said nothing.
    silent: bool,
}

impl Door {
    /// There is at least one address, because an empty list cannot be read.
    pub(super) fn new(addresses: Vec<Address>, name: String) -> Self {
        Self {
            addresses,
            current: 0,
            name,
            failed: false,
            silent: false,
        }
    }

    /// The address that is in use, or was tried last.
    pub(super) fn address(&self) -> &Address {
        &self.addresses[self.current]
    }

    /// Connects to the address whose turn it is. After a failure it is the next one's turn.
    pub(super) async fn connect(&mut self) -> Result<Open, Trouble> {
        if self.failed {
            self.current = (self.current + 1) % self.addresses.len();
        }
        let opened = self.try_connect().await;
        self.failed = opened.is_err();
        opened
    }

    async fn try_connect(&mut self) -> Result<Open, Trouble> {
        let uri = self.address().uri().clone();
        // A handshake that is given up leaves a thread of lapin behind until RabbitMQ goes on.
        // So while it is frozen, it is looked at without lapin.
        if self.silent {
            knock(&uri.authority.host, uri.authority.port).await?;
        }
        // lapin's own recovery stays off: it neither rotates addresses nor waits for queues.
        let properties =
            ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let connected = timeout(CONNECT_TIMEOUT, Connection::connect_uri(uri, properties)).await;
        self.silent = connected.is_err();
        let connection = connected.map_err(|_| Trouble::silent("a connection"))??;
        let events = connection.events_listener().boxed();
        Ok(Open {
            connection: Some(connection),
            events,
            blocked: None,
        })
    }
}

/// Sees whether an AMQP server answers at all.
async fn knock(host: &str, port: u16) -> Result<(), Trouble> {
    let answer = timeout(CONNECT_TIMEOUT, async {
        let mut stream = TcpStream::connect((host, port)).await?;
        stream.write_all(PROTOCOL_HEADER).await?;
        stream.read_u8().await
    });
    match answer.await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Trouble {
            kind: Kind::Away,
            reason: error.to_string(),
            fatal: true,
        }),
        Err(_) => Err(Trouble::silent("a connection")),
    }
}

/// A connection, with what it says about itself. It is closed when it is dropped.
///
/// lapin closes what nobody holds any more; but a command that was dropped half-way still holds
/// its channel, and RabbitMQ would keep deliveries for a consumer that is gone.
pub(super) struct Open {
    /// There until it is closed.
    connection: Option<Connection>,
    events: BoxStream<'static, Event>,
    blocked: Option<String>,
}

impl Open {
    pub(super) async fn channel(&mut self) -> Result<Channel, Trouble> {
        let Some(connection) = &self.connection else {
            return Err(Trouble::silent("the opening of a channel"));
        };
        command("the opening of a channel", connection.create_channel()).await
    }

    /// Why RabbitMQ takes nothing that is published here, if it said so.
    pub(super) fn blocked(&mut self) -> Option<&str> {
        while let Some(Some(event)) = self.events.next().now_or_never() {
            match event {
                Event::ConnectionBlocked(reason) => self.blocked = Some(reason),
                Event::ConnectionUnblocked => self.blocked = None,
                _ => {}
            }
        }
        self.blocked.as_deref()
    }

    /// Ends it in good order, or gives it up after a second.
    pub(super) async fn close(mut self) {
        if let Some(connection) = self.connection.take() {
            close(connection).await;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // Without a runtime the process ends, and its connections with it.
        if let (Some(connection), Ok(runtime)) = (self.connection.take(), Handle::try_current()) {
            runtime.spawn(close(connection));
        }
    }
}

async fn close(connection: Connection) {
    // What cannot be closed is dropped, which comes to the same for RabbitMQ.
    let _ = timeout(CLOSE_TIMEOUT, connection.close(200, "OK".into())).await;
}

/// Waits for a command, but not for ever.
pub(super) async fn command<T>(
    what: &str,
    command: impl Future<Output = lapin::Result<T>>,
) -> Result<T, Trouble> {
    match timeout(COMMAND_TIMEOUT, command).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Trouble::silent(what)),
    }
}
