//! The message service as a process of its own.

use std::path::PathBuf;
use std::process::Stdio;

use handfast_service::config::{Config, Settings};
use handfast_service::{serve as service, telemetry};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::place::Place;
use crate::topology::tables;
use crate::{Failure, usage};

/// How this program is told to be a message service.
pub(crate) const SUBCOMMAND: &str = "run-service";

/// Runs the message service in this process.
pub(crate) async fn serve(config: PathBuf) -> Result<(), Failure> {
    let config = Config::load(&config, Settings::default());
    let config = config.map_err(Failure::of("read the configuration"))?;
    telemetry::install(&config.server.log, config.server.log_format).map_err(Failure::of("log"))?;
    let served = service::serve(config, CancellationToken::new()).await;
    served.map_err(Failure::of("serve"))
}

/// A service that runs. Dropped, it is killed.
pub(crate) struct Service {
    process: Child,
    /// Where it serves.
    pub(crate) url: String,
    /// Its configuration, and its store where that is a file.
    _folder: TempDir,
}

impl Service {
    /// Starts one on the servers of a place.
    pub(crate) async fn on_servers(
        place: &Place,
        subscriptions: &[String],
    ) -> Result<Self, Failure> {
        let Place {
            store,
            amqp,
            deployment,
            ..
        } = place;
        let engines =
            format!("store = \"{store}\"\nbroker = \"{amqp}\"\ndeployment = \"{deployment}\"\n");
        Self::start(folder()?, &engines, subscriptions).await
    }

    /// Starts one on the embedded engines.
    pub(crate) async fn embedded(subscriptions: &[String]) -> Result<Self, Failure> {
        let folder = folder()?;
        let store = folder.path().join("handfast.sqlite");
        let engines = format!("store = \"sqlite:{}\"\n", store.display());
        Self::start(folder, &engines, subscriptions).await
    }

    async fn start(
        folder: TempDir,
        engines: &str,
        subscriptions: &[String],
    ) -> Result<Self, Failure> {
        let port = TcpListener::bind("127.0.0.1:0").await;
        let address = port.and_then(|port| port.local_addr());
        let address = address.map_err(Failure::of("find a free port"))?;
        let file = folder.path().join("handfast.toml");
        let text = format!(
            "topology_version = 1\n\n[server]\nlisten = \"{address}\"\nlog = \"warn\"\n{engines}\n{}",
            tables(subscriptions)
        );
        std::fs::write(&file, text).map_err(Failure::of("write the configuration"))?;
        let this = std::env::current_exe().map_err(Failure::of("find this program"))?;
        let process = Command::new(this)
            .arg(SUBCOMMAND)
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        Ok(Self {
            process: process.map_err(Failure::of("start the service"))?,
            url: format!("http://{address}"),
            _folder: folder,
        })
    }

    /// Returns when it has ended by itself, which it should not.
    pub(crate) async fn ended(&mut self) -> Failure {
        let ended = self.process.wait().await;
        Failure(format!("the service ended: {ended:?}"))
    }

    /// The most memory that it has had, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<f64, Failure> {
        usage::peak_mib(self.pid()?)
    }

    /// Processor time that it has used, in seconds.
    pub(crate) fn cpu_s(&self) -> Result<f64, Failure> {
        usage::cpu_of(self.pid()?)
    }

    fn pid(&self) -> Result<u32, Failure> {
        let pid = self.process.id();
        pid.ok_or_else(|| Failure("the service has ended".to_owned()))
    }

    /// Ends it. What it has promised is durable.
    pub(crate) async fn kill(mut self) -> Result<(), Failure> {
        let killed = self.process.kill().await;
        killed.map_err(Failure::of("end the service"))
    }
}

fn folder() -> Result<TempDir, Failure> {
    TempDir::with_prefix("handfast-bench-").map_err(Failure::of("make a folder"))
}
