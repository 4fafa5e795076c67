//! A TCP proxy on one link of a world, with the faults of a network.
//!
//! It knows nothing of what it carries. "There" is from who connects to who listens.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// Bytes that are carried at once.
const CHUNK: usize = 16 * 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To who listens.
    There,
    /// To who has connected.
    Back,
}

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As if both sides had closed them.
    Closed,
    /// As if one of the hosts had crashed and was up again.
    Reset,
}

#[derive(Clone, Debug, Default)]
struct Faults {
    /// Every chunk comes this much later.
    delay: Duration,
    /// What goes this way disappears.
    swallows: [bool; 2],
    /// New connections are ended at once.
    refuses: bool,
    /// Connections with a smaller number end, and how.
    ends_below: Option<(u64, End)>,
    /// The next answer on any connection is not carried: its connections end instead.
    ends_before_reply: bool,
    /// A request with these bytes is carried, and its connection ends instead of the reply.
    ends_before_reply_to: Option<&'static [u8]>,
    /// This way is closed in good order; the other goes on.
    half_closed: [bool; 2],
}

/// A proxy; dropped, it takes its connections along.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    faults: watch::Sender<Faults>,
    carried: Arc<[AtomicU64; 2]>,
    harmed: Arc<AtomicU64>,
    /// The number of the next connection.
    next: Arc<AtomicU64>,
    accepting: AbortHandle,
}

impl Proxy {
    /// Listens on a free port of loopback and carries to this address.
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await;
        let listener = listener.expect("a free port");
        let address = listener.local_addr().expect("its port");
        let faults = watch::Sender::new(Faults::default());
        let carried = Arc::<[AtomicU64; 2]>::default();
        let harmed = Arc::<AtomicU64>::default();
        let next = Arc::<AtomicU64>::default();
        let accept = {
            let (faults, carried, next) = (faults.clone(), carried.clone(), next.clone());
            let harmed = harmed.clone();
            async move {
                // They end with the proxy.
                let mut connections = JoinSet::new();
                while let Ok((near, _)) = listener.accept().await {
                    let link = Connection {
                        number: next.fetch_add(1, Ordering::SeqCst),
                        faults: faults.subscribe(),
                        shared: faults.clone(),
                        carried: carried.clone(),
                        harmed: harmed.clone(),
                        is_last: AtomicBool::new(false),
                    };
                    connections.spawn(link.carry(near, to));
                    while connections.try_join_next().is_some() {}
                }
            }
        };
        Self {
            address,
            faults,
            carried,
            harmed,
            next,
            accepting: tokio::spawn(accept).abort_handle(),
        }
    }

    /// Where to connect to.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that were carried this way so far.
    pub fn carried(&self, way: Way) -> u64 {
        self.carried[way as usize].load(Ordering::SeqCst)
    }

    /// How often a fault has met something: a connection that it ended or refused, or bytes that
    /// it kept.
    pub fn harmed(&self) -> u64 {
        self.harmed.load(Ordering::SeqCst)
    }

    /// From now on every chunk comes this much later.
    pub fn delays(&self, by: Duration) {
        self.faults.send_modify(|faults| faults.delay = by);
    }

    /// What goes this way disappears, or does no more.
    pub fn swallows(&self, way: Way, all: bool) {
        self.faults
            .send_modify(|faults| faults.swallows[way as usize] = all);
    }

    /// New connections are ended at once, or are not any more.
    pub fn refuses(&self, all: bool) {
        self.faults.send_modify(|faults| faults.refuses = all);
    }

    /// Ends no connection for a reply any more that has not come.
    pub fn spares_the_next_reply(&self) {
        self.faults
            .send_modify(|faults| faults.ends_before_reply = false);
    }

    /// Closes every connection that there is.
    pub fn cuts(&self) {
        self.ends(End::Closed);
    }

    /// Resets every connection that there is.
    pub fn resets(&self) {
        self.ends(End::Reset);
    }

    /// Lets the next request through, and ends its connection instead of carrying the reply.
    pub fn cuts_before_the_next_reply(&self) {
        self.faults
            .send_modify(|faults| faults.ends_before_reply = true);
    }

    /// Lets requests with these bytes through, and ends their connections instead of carrying the
    /// replies; or does no more.
    pub fn cuts_before_replies_to(&self, request: Option<&'static [u8]>) {
        self.faults
            .send_modify(|faults| faults.ends_before_reply_to = request);
    }

    /// Closes this way of every connection in good order, or of none any more.
    pub fn half_closes(&self, way: Way, all: bool) {
        self.faults
            .send_modify(|faults| faults.half_closed[way as usize] = all);
    }

    fn ends(&self, end: End) {
        let below = self.next.load(Ordering::SeqCst);
        self.faults
            .send_modify(|faults| faults.ends_below = Some((below, end)));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

struct Connection {
    number: u64,
    faults: watch::Receiver<Faults>,
    shared: watch::Sender<Faults>,
    carried: Arc<[AtomicU64; 2]>,
    harmed: Arc<AtomicU64>,
    /// Its last request went through, and the reply is not to.
    is_last: AtomicBool,
}

impl Connection {
    async fn carry(self, mut near: TcpStream, to: SocketAddr) {
        if self.faults.borrow().refuses {
            self.harms();
            return;
        }
        let Ok(mut far) = TcpStream::connect(to).await else {
            return;
        };
        // Without it small packets wait for each other; the link works either way.
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let end = {
            let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
            let there = self.pipe(near_in, far_out, Way::There);
            let back = self.pipe(far_in, near_out, Way::Back);
            tokio::select! {
                end = self.ended() => end,
                _ = async { tokio::try_join!(there, back) } => End::Closed,
            }
        };
        if end == End::Reset {
            let _ = (near.set_zero_linger(), far.set_zero_linger());
        }
    }

    /// How the test ends this connection.
    async fn ended(&self) -> End {
        let mut faults = self.faults.clone();
        loop {
            if let Some((below, end)) = faults.borrow_and_update().ends_below
                && self.number < below
            {
                self.harms();
                return end;
            }
            if faults.changed().await.is_err() {
                return End::Closed;
            }
        }
    }

    fn harms(&self) {
        self.harmed.fetch_add(1, Ordering::SeqCst);
    }

    /// Carries one way until its end. An error ends the other way, too.
    async fn pipe(
        &self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        way: Way,
    ) -> std::io::Result<()> {
        let mut faults = self.faults.clone();
        let mut chunk = vec![0; CHUNK];
        let mut is_open = true;
        loop {
            if faults.borrow_and_update().half_closed[way as usize] && is_open {
                is_open = false;
                self.harms();
                to.shutdown().await?;
            }
            let read = tokio::select! {
                read = from.read(&mut chunk) => read?,
                changed = faults.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Ok(()),
                },
            };
            if read == 0 {
                return to.shutdown().await;
            }
            let now = faults.borrow().clone();
            if !now.delay.is_zero() {
                self.harms();
                tokio::time::sleep(now.delay).await;
            }
            let lost = now.ends_before_reply || self.is_last.load(Ordering::SeqCst);
            if way == Way::Back && lost {
                self.harms();
                self.shared
                    .send_modify(|faults| faults.ends_before_reply = false);
                return Err(std::io::ErrorKind::ConnectionAborted.into());
            }
            if let Some(request) = now.ends_before_reply_to
                && way == Way::There
                && chunk[..read].windows(request.len()).any(|w| w == request)
            {
                self.is_last.store(true, Ordering::SeqCst);
            }
            if now.swallows[way as usize] {
                self.harms();
            } else if is_open {
                to.write_all(&chunk[..read]).await?;
                self.carried[way as usize].fetch_add(read as u64, Ordering::SeqCst);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);
    /// Nothing comes within this time that does not come at all.
    const QUIET: Duration = Duration::from_millis(200);

    /// A server that sends back what it gets.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.into_split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        address
    }

    async fn linked() -> (Proxy, TcpStream) {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut stream, "hello").await.unwrap(), "hello");
        (proxy, stream)
    }

    /// What comes back of what is said.
    async fn says(stream: &mut TcpStream, what: &str) -> std::io::Result<String> {
        stream.write_all(what.as_bytes()).await?;
        hears(stream).await
    }

    async fn hears(stream: &mut TcpStream) -> std::io::Result<String> {
        let mut heard = [0; 100];
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut heard));
        let read = read.await.expect("an end or an answer")?;
        Ok(String::from_utf8_lossy(&heard[..read]).into_owned())
    }

    #[tokio::test]
    async fn what_goes_through_is_counted() {
        let (proxy, mut stream) = linked().await;
        assert_eq!(says(&mut stream, "again").await.unwrap(), "again");
        assert_eq!(
            (proxy.carried(Way::There), proxy.carried(Way::Back)),
            (10, 10)
        );
    }

    #[tokio::test]
    async fn a_delay_comes_both_ways() {
        let (proxy, mut stream) = linked().await;
        proxy.delays(QUIET);
        let began = std::time::Instant::now();
        assert_eq!(says(&mut stream, "slow").await.unwrap(), "slow");
        assert!(began.elapsed() >= 2 * QUIET);
    }

    #[tokio::test]
    async fn what_is_swallowed_does_not_come_later() {
        let (proxy, mut stream) = linked().await;
        for way in [Way::There, Way::Back] {
            proxy.swallows(way, true);
            let answer = tokio::time::timeout(QUIET, says(&mut stream, "lost")).await;
            assert!(answer.is_err(), "nothing comes back");
            proxy.swallows(way, false);
            assert_eq!(says(&mut stream, "there").await.unwrap(), "there");
        }
    }

    #[tokio::test]
    async fn a_reset_is_an_error_and_a_cut_is_an_end() {
        let (proxy, mut stream) = linked().await;
        let mut other = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut other, "too").await.unwrap(), "too");
        proxy.resets();
        for stream in [&mut stream, &mut other] {
            let error = hears(stream).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut stream, "new").await.unwrap(), "new");
        proxy.cuts();
        assert_eq!(hears(&mut stream).await.unwrap(), "");
    }

    #[tokio::test]
    async fn a_request_goes_through_and_its_reply_does_not() {
        let (proxy, mut stream) = linked().await;
        proxy.cuts_before_the_next_reply();
        assert_eq!(says(&mut stream, "done?").await.unwrap_or_default(), "");
        assert_eq!(
            (proxy.carried(Way::There), proxy.carried(Way::Back)),
            (10, 5)
        );
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut stream, "again").await.unwrap(), "again");
    }

    #[tokio::test]
    async fn replies_to_some_requests_are_lost_and_to_others_are_not() {
        let (proxy, mut stream) = linked().await;
        assert_eq!(proxy.harmed(), 0);
        proxy.cuts_before_replies_to(Some(b"COMMIT\0"));
        for other in ["READ COMMITTED\0", "BEGIN\0"] {
            assert_eq!(says(&mut stream, other).await.unwrap(), other);
        }
        let carried = proxy.carried(Way::There);
        assert_eq!(
            says(&mut stream, "a COMMIT\0").await.unwrap_or_default(),
            ""
        );
        assert_eq!(proxy.harmed(), 1);
        assert_eq!(proxy.carried(Way::There), carried + 9);
        proxy.cuts_before_replies_to(None);
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut stream, "COMMIT\0").await.unwrap(), "COMMIT\0");
    }

    #[tokio::test]
    async fn one_way_ends_and_the_other_goes_on() {
        let (proxy, mut stream) = linked().await;
        proxy.half_closes(Way::Back, true);
        assert_eq!(hears(&mut stream).await.unwrap(), "");
        stream.write_all(b"into the void").await.unwrap();
        tokio::time::timeout(PATIENCE, async {
            while proxy.carried(Way::There) < 18 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert_eq!(proxy.carried(Way::Back), 5);
    }

    #[tokio::test]
    async fn who_is_refused_gets_an_end_at_once() {
        let (proxy, mut stream) = linked().await;
        proxy.refuses(true);
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut refused, "x").await.unwrap_or_default(), "");
        assert_eq!(says(&mut stream, "old").await.unwrap(), "old");
    }
}
