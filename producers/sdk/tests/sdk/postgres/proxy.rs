//! A TCP proxy in front of PostgreSQL that understands what is asked, and loses what it is told.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(20);

/// What becomes of the next COMMIT. The connection is cut in each case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cut {
    /// The server has committed; its reply is lost.
    Reply = 1,
    /// The server never hears of it.
    Request = 2,
    /// As `Reply`, and from then on the server is out of reach.
    ReplyAndAll = 3,
}

pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    wires: Arc<Wires>,
    _stop: DropGuard,
}

/// What the connections share.
struct Wires {
    armed: AtomicU8,
    swallow: Mutex<Swallow>,
    silent: watch::Sender<usize>,
    gone: CancellationToken,
}

#[derive(Default)]
struct Swallow {
    text: &'static str,
    connections: usize,
}

impl Proxy {
    /// A proxy in front of the server of these options.
    pub(super) async fn before(server: &PgConnectOptions) -> Self {
        let server = tokio::net::lookup_host((server.get_host(), server.get_port()))
            .await
            .unwrap()
            .next()
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gone = CancellationToken::new();
        let wires = Arc::new(Wires {
            armed: AtomicU8::new(0),
            swallow: Mutex::default(),
            silent: watch::Sender::new(0),
            gone: gone.clone(),
        });
        let carried = wires.clone();
        tokio::spawn(gone.clone().run_until_cancelled_owned(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(server).await.unwrap();
                let carrying = carry(client, server, carried.clone());
                tokio::spawn(carried.gone.clone().run_until_cancelled_owned(carrying));
            }
        }));
        Self {
            address,
            wires,
            _stop: gone.drop_guard(),
        }
    }

    /// The same options, by way of the proxy.
    pub(super) fn options(&self, server: PgConnectOptions) -> PgConnectOptions {
        server
            .host(&self.address.ip().to_string())
            .port(self.address.port())
    }

    /// The next COMMIT of any connection is cut, once.
    pub(super) fn cut(&self, cut: Cut) {
        self.wires.armed.store(cut as u8, Ordering::SeqCst);
    }

    /// Whether the COMMIT has come.
    pub(super) fn has_cut(&self) -> bool {
        self.wires.armed.load(Ordering::SeqCst) == 0
    }

    /// The next so many connections that send this text hear nothing any more: the server is
    /// asked, its replies are lost, and the connection stays.
    pub(super) fn swallow(&self, text: &'static str, connections: usize) {
        *self.wires.swallow.lock().unwrap() = Swallow { text, connections };
    }

    /// Waits until so many connections hear nothing.
    pub(super) async fn until_silent(&self, connections: usize) {
        let mut silent = self.wires.silent.subscribe();
        let enough = silent.wait_for(|silent| *silent >= connections);
        timeout(PATIENCE, enough).await.unwrap().unwrap();
    }
}

impl Wires {
    /// Whether the replies to this request are to be lost.
    fn swallows(&self, request: &[u8]) -> bool {
        let mut swallow = self.swallow.lock().unwrap();
        let text = swallow.text.as_bytes();
        if swallow.connections == 0 || !request.windows(text.len()).any(|part| part == text) {
            return false;
        }
        swallow.connections -= 1;
        self.silent.send_modify(|silent| *silent += 1);
        true
    }
}

async fn carry(mut client: TcpStream, mut server: TcpStream, wires: Arc<Wires>) {
    let (mut out, mut back) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut silent = false;
    loop {
        tokio::select! {
            read = client.read(&mut out) => {
                let Ok(bytes @ 1..) = read else { return };
                silent = silent || wires.swallows(&out[..bytes]);
                // The client sends COMMIT in a message of its own and waits for the reply.
                let commits = out[..bytes].ends_with(b"COMMIT\0");
                let cut = if commits { wires.armed.swap(0, Ordering::SeqCst) } else { 0 };
                if cut == Cut::Request as u8 {
                    return;
                }
                if server.write_all(&out[..bytes]).await.is_err() {
                    return;
                }
                if cut != 0 {
                    let replied = server.read(&mut back).await.unwrap();
                    assert!(replied > 0, "the server has not replied to COMMIT");
                    if cut == Cut::ReplyAndAll as u8 {
                        wires.gone.cancel();
                    }
                    return;
                }
            }
            read = server.read(&mut back) => {
                let Ok(bytes @ 1..) = read else { return };
                if !silent && client.write_all(&back[..bytes]).await.is_err() {
                    return;
                }
            }
        }
    }
}
