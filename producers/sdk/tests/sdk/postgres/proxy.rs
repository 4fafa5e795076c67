//! A TCP proxy in front of PostgreSQL that understands where a COMMIT is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

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
    armed: Arc<AtomicU8>,
    _stop: DropGuard,
}

impl Proxy {
    pub(super) async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let armed = Arc::new(AtomicU8::new(0));
        let (arm, stop) = (armed.clone(), CancellationToken::new());
        let gone = stop.clone();
        tokio::spawn(gone.clone().run_until_cancelled_owned(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(server).await.unwrap();
                let carrying = carry(client, server, arm.clone(), gone.clone());
                tokio::spawn(gone.clone().run_until_cancelled_owned(carrying));
            }
        }));
        Self {
            address,
            armed,
            _stop: stop.drop_guard(),
        }
    }

    /// The next COMMIT of any connection is cut, once.
    pub(super) fn cut(&self, cut: Cut) {
        self.armed.store(cut as u8, Ordering::SeqCst);
    }

    /// Whether the COMMIT has come.
    pub(super) fn has_cut(&self) -> bool {
        self.armed.load(Ordering::SeqCst) == 0
    }
}

async fn carry(
    mut client: TcpStream,
    mut server: TcpStream,
    armed: Arc<AtomicU8>,
    gone: CancellationToken,
) {
    let (mut out, mut back) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut out) => {
                let Ok(bytes @ 1..) = read else { return };
                // The client sends COMMIT in a message of its own and waits for the reply.
                let commits = out[..bytes].ends_with(b"COMMIT\0");
                let cut = if commits { armed.swap(0, Ordering::SeqCst) } else { 0 };
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
                        gone.cancel();
                    }
                    return;
                }
            }
            read = server.read(&mut back) => {
                let Ok(bytes @ 1..) = read else { return };
                if client.write_all(&back[..bytes]).await.is_err() {
                    return;
                }
            }
        }
    }
}
