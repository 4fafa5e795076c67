//! Where a run lives: its folder, its files, its ports, its engines.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rand::Rng;
use tempfile::TempDir;

use super::Error;
use super::engines::{Engines, Timers};
use super::plan::Role;

/// Ports are taken below the range from which systems take the ports of outgoing connections:
/// one of those could sit on the port of a process that is dead at the moment.
const PORTS: std::ops::Range<u16> = 15_000..30_000;
/// Every port is tried once or twice before it is given up.
const MAX_PORT_TRIES: u32 = 30_000;
/// The configuration names store and broker with their passwords.
const OWNER_ALONE: u32 = 0o600;

/// The folder of a run.
pub(crate) struct Home {
    path: PathBuf,
    engines: Engines,
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
    /// Makes the folder, for embedded engines: one that goes away at the end, or `keep`, which
    /// must not hold files of a former run.
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
                engines: Engines::Embedded,
                temporary: Some(temporary),
                ports,
            });
        };
        let failed = |source| Error::Folder {
            path: keep.to_owned(),
            source,
        };
        std::fs::create_dir_all(keep).map_err(failed)?;
        // Children are told of the folder; a relative one is as good, because they start where
        // we are.
        let home = Self {
            path: keep.to_owned(),
            engines: Engines::Embedded,
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

    /// The same folder, for a run on these engines.
    pub(crate) fn on(self, engines: Engines) -> Self {
        Self { engines, ..self }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// True if it stays.
    pub(crate) const fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }

    /// What it works on.
    pub(crate) fn engines(&self) -> &Engines {
        &self.engines
    }

    /// The file of one process's database, where databases are files.
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

    /// The same, for its clients.
    pub(crate) fn service_url(&self) -> String {
        format!("http://{}", self.service())
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
        let written = OpenOptions::new()
            .write(true)
            // A file that was there would keep the mode that it has.
            .create_new(true)
            .mode(OWNER_ALONE)
            .open(&path)
            .and_then(|mut file| file.write_all(self.config_text().as_bytes()));
        written.map_err(|source| Error::Folder { path, source })
    }

    fn config_text(&self) -> String {
        let engines = self.engines.server_lines(&self.database(Role::Service));
        let Timers {
            check_after_ms,
            publisher_confirm_ms,
            lease_ms,
            resend_after_ms,
            step_ms,
            passed_by_ms,
            start_grace_ms,
            ..
        } = self.engines.timers();
        let (service, status) = (self.service(), self.status());
        let subscriptions: String = [Role::Accounting, Role::Points]
            .iter()
            .map(|role| {
                format!(
                    "\n[[subscription]]\nname = \"{role}\"\ntopic = \"{topic}\"\n\
                     schedule_ms = [{step_ms}]\n",
                    topic = payment::pay::TOPIC,
                )
            })
            .collect();
        format!(
            "# Written by `handfast demo`: the shortened timers of a demonstration.\n\
             topology_version = 1\n\n\
             [server]\n\
             listen = \"{service}\"\n\
             {engines}\
             shutdown_deadline_s = 5\n\
             publisher_confirm_ms = {publisher_confirm_ms}\n\
             lease_ms = {lease_ms}\n\
             resend_after_ms = {resend_after_ms}\n\
             passed_by_ms = {passed_by_ms}\n\
             start_grace_ms = {start_grace_ms}\n\n\
             [[producer]]\n\
             name = \"{producer}\"\n\
             status_endpoint = \"http://{status}\"\n\
             check_after_ms = {check_after_ms}\n\n\
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
        let error = Home::make(Some(&keep), chance).err().unwrap().to_string();
        assert!(error.contains("handfast.toml"), "{error}");
    }

    #[test]
    fn only_its_owner_may_read_the_configuration() {
        use std::os::unix::fs::PermissionsExt as _;

        let home = Home::make(None, &mut StdRng::seed_from_u64(1)).unwrap();
        home.write_config().unwrap();
        let mode = home.config().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
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
