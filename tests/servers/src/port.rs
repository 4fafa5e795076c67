//! Ports that belong to one server for as long as it lives, also while it is down.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::Error;

/// Below the ports that the kernel gives to outgoing connections and to "any free port", so that
/// nobody gets one of these by chance while its server is down.
const FIRST: u16 = 15_000;
const COUNT: u16 = 15_000;

/// A port that no other server of this crate takes, in whatever process. The name of a Unix
/// socket says so: the kernel keeps it as long as this process lives and no longer.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) number: u16,
    _name: UnixListener,
}

impl Port {
    pub(crate) fn take() -> Result<Self, Error> {
        let chance = RandomState::new().build_hasher().finish();
        let start = u16::try_from(chance % u64::from(COUNT)).unwrap_or_default();
        (0..COUNT)
            .map(|step| FIRST + (start + step) % COUNT)
            .find_map(Self::reserve)
            .ok_or_else(|| {
                let last = FIRST + (COUNT - 1);
                Error::new(format!("no port is free from {FIRST} to {last}"))
            })
    }

    fn reserve(number: u16) -> Option<Self> {
        let name = SocketAddr::from_abstract_name(format!("handfast-port-{number}")).ok()?;
        let name = UnixListener::bind_addr(&name).ok()?;
        // Listens for a moment, to see that nobody else does.
        TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
        Some(Self {
            number,
            _name: name,
        })
    }
}
