//! Connections as they come in, for a server that a full host must not end.
//!
//! Public for the reference services of this workspace, and no promise to others.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;

/// How long no connection is accepted after the host refused one, for example because too
/// many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections. A host that is out of files refuses every try at once, and a server
/// that is told of it ends; so a refusal is followed by a pause instead.
pub fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> + Send {
    Incoming {
        accept: move |cx: &mut Context<'_>| listener.poll_accept(cx).map_ok(|(new, _)| new),
        pause: None,
    }
}

struct Incoming<A> {
    accept: A,
    /// The host has refused, and is left alone until this is over.
    pause: Option<Pin<Box<Sleep>>>,
}

impl<A> Stream for Incoming<A>
where
    A: FnMut(&mut Context<'_>) -> Poll<io::Result<TcpStream>> + Unpin,
{
    type Item = io::Result<TcpStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!((self.accept)(cx)) {
                Ok(connection) => {
                    // Without it, small replies wait for a timer. The connection works either
                    // way.
                    let _ = connection.set_nodelay(true);
                    return Poll::Ready(Some(Ok(connection)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection: {error}");
                    self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;
    use tokio_stream::StreamExt as _;

    use super::*;

    const TOO_MANY_OPEN_FILES: i32 = 24;

    #[tokio::test]
    async fn a_host_that_is_out_of_files_is_asked_again_after_a_pause() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _waiting = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut refusals = 2;
        let mut incoming = Incoming {
            accept: |cx: &mut Context<'_>| {
                if refusals > 0 {
                    refusals -= 1;
                    let refused = io::Error::from_raw_os_error(TOO_MANY_OPEN_FILES);
                    return Poll::Ready(Err(refused));
                }
                listener.poll_accept(cx).map_ok(|(new, _)| new)
            },
            pause: None,
        };
        let began = Instant::now();
        incoming.next().await.unwrap().unwrap();
        assert!(began.elapsed() >= 2 * ACCEPT_PAUSE);
    }
}
