//! The links between the parties of a world, and proxies on them.

use std::net::SocketAddr;
use std::process::Command;

use crate::proxy::Proxy;
use crate::world::{Party, STATUS_PORT, World};

/// Who connects to whom. Of two message services, it is the first whose links these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Payment to the message service.
    Messages,
    /// Message services to payment's status endpoint.
    Status,
    /// The message service to PostgreSQL.
    Store,
    /// The message service to RabbitMQ.
    Broker,
    /// Payment to PostgreSQL.
    Business,
    /// Accounting to RabbitMQ.
    Deliveries,
    /// Accounting to PostgreSQL.
    Effects,
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Messages,
        Self::Status,
        Self::Store,
        Self::Broker,
        Self::Business,
        Self::Deliveries,
        Self::Effects,
    ];

    /// Who connects.
    pub const fn party(self) -> Party {
        match self {
            Self::Status | Self::Store | Self::Broker => Party::Service,
            Self::Messages | Self::Business => Party::Payment,
            Self::Deliveries | Self::Effects => Party::Accounting,
        }
    }
}

impl World {
    /// Puts a proxy on a link. Who connects is told of it at its next start; message services
    /// learn of [`Link::Status`] by their topology, so there the first start must be yet to come.
    pub async fn proxy(&mut self, link: Link) -> Proxy {
        let proxy = Proxy::start(host_of(&self.end_of(link))).await;
        self.detours.insert(link, proxy.address());
        if link == Link::Status {
            self.config = self.usual_config();
        }
        proxy
    }

    /// Where payment answers what became of its messages.
    pub(crate) fn status_address(&self) -> SocketAddr {
        let direct = self.address(STATUS_PORT);
        self.detours.get(&Link::Status).copied().unwrap_or(direct)
    }

    /// Where a link ends, by way of no proxy.
    fn end_of(&self, link: Link) -> String {
        match link {
            Link::Messages => self.service_url(),
            Link::Status => format!("http://{}", self.address(STATUS_PORT)),
            Link::Broker | Link::Deliveries => self.rabbitmq().0,
            Link::Store | Link::Business | Link::Effects => self.database_url(link.party()),
        }
    }

    /// Tells who is to be started of the proxies on its links.
    pub(crate) fn detoured(&self, party: Party, command: &mut Command) {
        let links = self
            .detours
            .iter()
            .filter(|(link, _)| link.party() == party);
        for (link, proxy) in links {
            let end = self.end_of(*link);
            let by_proxy = end.replace(&host_of(&end).to_string(), &proxy.to_string());
            match link {
                Link::Status => {}
                Link::Store => drop(command.arg("--store").arg(by_proxy)),
                Link::Broker => drop(command.arg("--broker").arg(by_proxy)),
                Link::Messages => {
                    let others = self.replicated.then(|| self.replica_url());
                    let all = [Some(by_proxy), others].into_iter().flatten();
                    let all = all.collect::<Vec<_>>().join(",");
                    command.env("PAYMENT_SERVICE", all);
                }
                Link::Business => drop(command.env("PAYMENT_DATABASE", by_proxy)),
                Link::Effects => drop(command.env("ACCOUNTING_DATABASE", by_proxy)),
                Link::Deliveries => drop(command.env("ACCOUNTING_SOURCE", by_proxy)),
            }
        }
    }
}

/// The address in a URL.
pub(crate) fn host_of(url: &str) -> SocketAddr {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let host = rest
        .split(['/', '?'])
        .next()
        .and_then(|host| host.parse().ok());
    host.unwrap_or_else(|| panic!("{url} has no address"))
}
