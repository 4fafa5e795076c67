//! Where RabbitMQ is, and how that is shown without its password.

use std::fmt;

use lapin::uri::{AMQPScheme, AMQPUri};

use crate::error::Error;

/// Seconds without a sign of life after which a connection is given up.
const HEARTBEAT_S: u16 = 10;
const FORM: &str = "it must be like amqp://user:password@127.0.0.1:5672/%2f";
const NO_TLS: &str = "amqps:// is not supported yet; use amqp://";

/// One address of RabbitMQ.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    uri: AMQPUri,
    shown: String,
}

impl Address {
    /// Reads a list of addresses separated by commas.
    pub(super) fn read_all(addresses: &str) -> Result<Vec<Self>, Error> {
        addresses
            .split(',')
            .map(|one| Self::read(one.trim()))
            .collect()
    }

    fn read(address: &str) -> Result<Self, Error> {
        let wrong = |reason: &str| Error::Address {
            address: without_password(address),
            reason: reason.to_owned(),
        };
        // What the parser says may repeat the password.
        let mut uri: AMQPUri = address.parse().map_err(|_| wrong(FORM))?;
        if uri.scheme != AMQPScheme::AMQP {
            return Err(wrong(NO_TLS));
        }
        let host = host(address).ok_or_else(|| wrong(FORM))?;
        if let Some(ipv6) = host.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')) {
            // The parser would take localhost instead.
            uri.authority.host = ipv6.to_owned();
        }
        uri.query.heartbeat = Some(HEARTBEAT_S);
        Ok(Self {
            uri,
            shown: without_password(address),
        })
    }

    pub(super) fn uri(&self) -> &AMQPUri {
        &self.uri
    }

    /// The name that RabbitMQ knows this connection's user by.
    pub(super) fn user(&self) -> &str {
        &self.uri.authority.userinfo.username
    }

    /// As it was given, without its password.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// The host as it is written, `[…]` included.
fn host(address: &str) -> Option<&str> {
    let (_, rest) = address.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    let end = match host.find(']') {
        Some(bracket) => bracket + 1,
        None => host.find(':').unwrap_or(host.len()),
    };
    (end > 0).then(|| &host[..end])
}

/// The address without what may be a password, however malformed it is.
fn without_password(address: &str) -> String {
    let (scheme, rest) = match address.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), address),
    };
    match rest.rsplit_once('@') {
        Some((user, host)) => {
            let user = user.split(':').next().unwrap_or_default();
            format!("{scheme}{user}@{host}")
        }
        // A password whose `@` is missing would stand where the port does.
        None => match rest.split_once(':') {
            Some((host, port)) if !port.starts_with(|c: char| c.is_ascii_digit()) => {
                format!("{scheme}{host}")
            }
            _ => format!("{scheme}{rest}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_addresses_is_read() {
        let list = "amqp://ada:pass@one:5673/%2f, amqp://[::1]/shop";
        let addresses = Address::read_all(list).unwrap();
        let hosts: Vec<_> = addresses
            .iter()
            .map(|a| (a.uri().authority.host.as_str(), a.uri().authority.port))
            .collect();
        assert_eq!(hosts, [("one", 5673), ("::1", 5672)]);
        assert_eq!(addresses[0].user(), "ada");
        assert_eq!(addresses[1].uri().vhost, "shop");
    }

    #[test]
    fn an_address_that_cannot_be_used_is_refused_in_one_line_without_its_password() {
        for address in [
            "",
            "secret",
            "amqp://",
            "amqp:///%2f",
            "amqp:guest:secret@one",
            "amqps://guest:secret@one",
            "http://guest:secret@one",
            "amqp://guest:secret@one:port",
            "amqp://guest:secret@one,",
            "amqp://guest:sec,ret@one",
            "amqp://guest:secret",
            "//guest:se@cret@one",
        ] {
            let error = Address::read_all(address).unwrap_err().to_string();
            let hidden = error.replace("`secret`", "");
            assert!(!hidden.contains("sec"), "{address}: {error}");
            assert!(!hidden.contains("cret"), "{address}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn an_address_is_shown_without_its_password() {
        let addresses = Address::read_all("amqp://ada:p%40ss@one:5673/shop").unwrap();
        assert_eq!(format!("{addresses:?}"), "[amqp://ada@one:5673/shop]");
    }
}
