//! A network between the consumer and RabbitMQ that can be cut and can swallow connections.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::rabbit;

pub(crate) struct Proxy {
    local: SocketAddr,
    /// Counts cuts; what was open before one ends at it.
    cuts: watch::Sender<u32>,
    /// While it is true, new connections are taken and nothing is carried.
    silent: watch::Sender<bool>,
    accepted: watch::Sender<u32>,
}

impl Proxy {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            local: listener.local_addr().unwrap(),
            cuts: watch::channel(0).0,
            silent: watch::channel(false).0,
            accepted: watch::channel(0).0,
        };
        let target = rabbit::address();
        let host = target.rsplit_once('@').unwrap().1;
        let target = host.split('/').next().unwrap().to_owned();
        let (cuts, silent) = (proxy.cuts.clone(), proxy.silent.clone());
        let accepted = proxy.accepted.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                accepted.send_modify(|count| *count += 1);
                let mut cut = cuts.subscribe();
                cut.mark_unchanged();
                let carry = carry(client, target.clone(), silent.subscribe());
                tokio::spawn(async move {
                    tokio::select! {
                        () = carry => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        proxy
    }

    /// RabbitMQ's address by way of this.
    pub(crate) fn address(&self) -> String {
        let target = rabbit::address();
        let (user, rest) = target.rsplit_once('@').unwrap();
        let vhost = rest.split_once('/').map_or("", |(_, vhost)| vhost);
        format!("{user}@{}/{vhost}", self.local)
    }

    /// Ends every connection.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|count| *count += 1);
    }

    pub(crate) fn silent(&self, yes: bool) {
        self.silent.send_replace(yes);
    }

    /// Waits until so many connections were made since the start.
    pub(crate) async fn until_connections(&self, count: u32) {
        let mut accepted = self.accepted.subscribe();
        let wait = accepted.wait_for(|so_far| *so_far >= count);
        let met = tokio::time::timeout(super::PATIENCE, wait).await.is_ok();
        assert!(met, "fewer than {count} connections");
    }
}

async fn carry(mut client: TcpStream, target: String, mut silent: watch::Receiver<bool>) {
    if silent.wait_for(|silent| !silent).await.is_err() {
        return;
    }
    if let Ok(mut server) = TcpStream::connect(target).await {
        // However it ends, both ends are closed.
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
}
