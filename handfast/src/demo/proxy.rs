//! A wire between the run and RabbitMQ that can be cut.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::Error;

/// Forwards connections until it is dropped.
pub(crate) struct Proxy {
    url: String,
    /// Counts the cuts; a connection ends when it changes.
    cuts: watch::Sender<u64>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// Listens on loopback, in front of the server that an AMQP URL names.
    pub(crate) async fn start(broker: &str) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::RabbitMq(error.to_string());
        let (before, server, behind) = parts(broker);
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let cuts = watch::Sender::new(0);
        let accepting = tokio::spawn(accept(listener, server, cuts.clone()));
        Ok(Self {
            url: format!("{before}{address}{behind}"),
            cuts,
            _accepting: AbortOnDropHandle::new(accepting),
        })
    }

    /// The URL by way of this wire.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Ends every connection at once. New ones are let through.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

async fn accept(listener: TcpListener, server: String, cuts: watch::Sender<u64>) {
    while let Ok((mut near, _)) = listener.accept().await {
        let (server, mut cut) = (server.clone(), cuts.subscribe());
        tokio::spawn(async move {
            let Ok(mut far) = TcpStream::connect(server).await else {
                return;
            };
            // Whichever comes first, both ends are closed by being dropped.
            tokio::select! {
                _ = copy_bidirectional(&mut near, &mut far) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

/// What stands before the host and port of a URL, the two, and what follows.
fn parts(url: &str) -> (&str, String, &str) {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let end = url[begin..].find('/').map_or(url.len(), |at| begin + at);
    let host = url[begin..end]
        .rfind('@')
        .map_or(begin, |at| begin + at + 1);
    let server = &url[host..end];
    let has_port = server
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.chars().all(|c| c.is_ascii_digit()));
    let server = match has_port {
        true => server.to_owned(),
        false => format!("{server}:5672"),
    };
    (&url[..host], server, &url[end..])
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn the_server_of_a_url_is_found() {
        for (url, before, server, behind) in [
            ("amqp://u:p@h:1/%2f", "amqp://u:p@", "h:1", "/%2f"),
            ("amqp://h", "amqp://", "h:5672", ""),
            ("amqp://h/v?x=1", "amqp://", "h:5672", "/v?x=1"),
        ] {
            assert_eq!(parts(url), (before, server.to_owned(), behind));
        }
    }

    #[tokio::test]
    async fn a_cut_ends_open_connections_and_lets_new_ones_through() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("amqp://{}/v", server.local_addr().unwrap());
        let proxy = Proxy::start(&url).await.unwrap();
        let (_, near, behind) = parts(proxy.url());
        assert_eq!(behind, "/v");
        for _ in 0..2 {
            let mut client = TcpStream::connect(&near).await.unwrap();
            let (mut served, _) = server.accept().await.unwrap();
            client.write_all(b"x").await.unwrap();
            assert_eq!(served.read_u8().await.unwrap(), b'x');
            proxy.cut();
            assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
        }
    }
}
