//! Where a run lives: its folder, its files, its ports, and the shortened timers.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use rand::Rng;
use tempfile::TempDir;

use super::Error;
use super::plan::Role;

/// The test timers, in milliseconds; the design's rules between them hold as with the
/// defaults: publisher confirm < handler < lease < resend.
pub(crate) const CHECK_AFTER_MS: u64 = 500;
/// How long a send may take.
pub(crate) const PUBLISHER_CONFIRM_MS: u64 = 1_000;
/// How long a consumer's transaction may take.
pub(crate) const HANDLER_MS: u64 = 1_500;
/// How long a claim belongs to its claimer.
pub(crate) const LEASE_MS: u64 = 2_000;
/// When silence is looked at.
pub(crate) const RESEND_AFTER_MS: u64 = 3_000;
/// Every wait between two attempts.
pub(crate) const STEP_MS: u64 = 3_000;
/// How much later than a lost delivery an answered one was sent.
pub(crate) const PASSED_BY_MS: u64 = 1_000;
/// How long after a start nothing is resent.
pub(crate) const START_GRACE_MS: u64 = 1_000;

/// Ports are taken below the range from which systems take the ports of outgoing connections:
/// one of those could sit on the port of a process that is dead at the moment.
const PORTS: std::ops::Range<u16> = 15_000..30_000;
/// Every port is tried once or twice before it is given up.
const MAX_PORT_TRIES: u32 = 30_000;

/// The folder of a run.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    /// Removes the folder when it is dropped, unless the folder is to be kept.
    temporary: Option<TempDir>,
    ports: Ports,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    service: u16,
    payment: u16,
    status: u16,
}

impl Home {
    /// Makes the folder: one that goes away at the end, or `keep`, which must not hold files
    /// of a former run.
    pub(crate) fn make(keep: Option<&Path>, chance: &mut impl Rng) -> Result<Self, Error> {
        let ports = free_ports(chance)?;
        let Some(keep) = keep else {
            let temporary =
                TempDir::with_prefix("handfast-demo-").map_err(|source| Error::Folder {
                    path: std::env::temp_dir(),
                    source,
                })?;
            return Ok(Self {
                path: temporary.path().to_owned(),
                temporary: Some(temporary),
                ports,
            });
        };
        let failed = |source| Error::Folder {
            path: keep.to_owned(),
            source,
        };
        std::fs::create_dir_all(keep).map_err(failed)?;
        // Children have the folder in their command lines; a relative one is as good, because
        // they start where we are.
        let home = Self {
            path: keep.to_owned(),
            temporary: None,
            ports,
        };
        let mut files: Vec<PathBuf> = vec![home.config()];
        files.extend(Role::ALL.map(|role| home.database(role)));
        files.extend(Role::ALL.map(|role| home.log(role)));
        match files.into_iter().find(|file| file.exists()) {
            None => Ok(home),
            Some(file) => Err(Error::UsedFolder { file }),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// True if it stays.
    pub(crate) const fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }

    /// The database of one process.
    pub(crate) fn database(&self, role: Role) -> PathBuf {
        self.path.join(format!("{role}.db"))
    }

    /// What one process, in all its lives, has logged.
    pub(crate) fn log(&self, role: Role) -> PathBuf {
        self.path.join(format!("{role}.log"))
    }

    /// The configuration file of the service.
    pub(crate) fn config(&self) -> PathBuf {
        self.path.join("handfast.toml")
    }

    /// The address of the service.
    pub(crate) fn service(&self) -> SocketAddr {
        local(self.ports.service)
    }

    /// The address of payment's API.
    pub(crate) fn payment(&self) -> SocketAddr {
        local(self.ports.payment)
    }

    /// The address of payment's status server.
    pub(crate) fn status(&self) -> SocketAddr {
        local(self.ports.status)
    }

    /// Writes the configuration of the service.
    pub(crate) fn write_config(&self) -> Result<(), Error> {
        let path = self.config();
        std::fs::write(&path, self.config_text()).map_err(|source| Error::Folder { path, source })
    }

    fn config_text(&self) -> String {
        let store = format!("sqlite:{}", self.database(Role::Service).display());
        // TOML's basic strings escape as JSON's do.
        let store = serde_json::Value::from(store);
        let (service, status) = (self.service(), self.status());
        let subscriptions: String = [Role::Accounting, Role::Points]
            .iter()
            .map(|role| {
                format!(
                    "\n[[subscription]]\nname = \"{role}\"\ntopic = \"{topic}\"\n\
                     schedule_ms = [{STEP_MS}]\n",
                    topic = payment::pay::TOPIC,
                )
            })
            .collect();
        format!(
            "# Written by `handfast demo`: the shortened timers of a demonstration.\n\
             topology_version = 1\n\n\
             [server]\n\
             listen = \"{service}\"\n\
             store = {store}\n\
             broker = \"embedded\"\n\
             shutdown_deadline_s = 5\n\
             publisher_confirm_ms = {PUBLISHER_CONFIRM_MS}\n\
             lease_ms = {LEASE_MS}\n\
             resend_after_ms = {RESEND_AFTER_MS}\n\
             passed_by_ms = {PASSED_BY_MS}\n\
             start_grace_ms = {START_GRACE_MS}\n\n\
             [[producer]]\n\
             name = \"{producer}\"\n\
             status_endpoint = \"http://{status}\"\n\
             check_after_ms = {CHECK_AFTER_MS}\n\n\
             [[topic]]\n\
             name = \"{topic}\"\n\
             producers = [\"{producer}\"]\n\
             {subscriptions}",
            producer = payment::run::PRODUCER,
            topic = payment::pay::TOPIC,
        )
    }
}

const fn local(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Three ports on which nobody listens at this moment.
fn free_ports(chance: &mut impl Rng) -> Result<Ports, Error> {
    // Held together until all are found, so that they differ.
    let mut held: Vec<(u16, TcpListener)> = Vec::new();
    for _ in 0..MAX_PORT_TRIES {
        let port = chance.random_range(PORTS);
        if let Ok(listener) = TcpListener::bind(local(port)) {
            held.push((port, listener));
        }
        if let [(service, _), (payment, _), (status, _)] = held[..] {
            return Ok(Ports {
                service,
                payment,
                status,
            });
        }
    }
    Err(Error::NoPort)
}

#[cfg(test)]
mod tests {
    use handfast_service::config::{Config, Settings};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn the_service_understands_its_configuration() {
        let home = Home::make(None, &mut StdRng::seed_from_u64(1)).unwrap();
        let config = Config::parse(&home.config_text(), "x", Settings::default()).unwrap();
        assert_eq!(config.server.listen, home.service());
        let topology = config.topology.unwrap();
        assert!(topology.has_subscriber(payment::pay::TOPIC));
        assert_eq!(topology.subscriptions.len(), 2);
    }

    #[test]
    fn a_folder_of_a_former_run_is_refused_and_named() {
        let dir = TempDir::new().unwrap();
        let keep = dir.path().join("new/folder");
        let chance = &mut StdRng::seed_from_u64(1);
        let home = Home::make(Some(&keep), chance).unwrap();
        home.write_config().unwrap();
        let error = Home::make(Some(&keep), chance).unwrap_err().to_string();
        assert!(error.contains("handfast.toml"), "{error}");
    }

    #[test]
    fn a_temporary_folder_goes_away() {
        let home = Home::make(None, &mut StdRng::seed_from_u64(1)).unwrap();
        let path = home.path().to_owned();
        home.write_config().unwrap();
        assert!(path.exists() && !home.is_kept());
        drop(home);
        assert!(!path.exists());
    }
}
