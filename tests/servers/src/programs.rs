//! Where the programs are that tests need. The servers are often installed outside of PATH.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// What has to be installed: the servers that this crate can start, and Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// [`Postgres`](crate::Postgres)
    Postgres,
    /// [`RabbitMq`](crate::RabbitMq)
    RabbitMq,
    /// Python 3.9 or later, as `python3`, that can make environments.
    Python,
}

impl Program {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "PostgreSQL",
            Self::RabbitMq => "RabbitMQ",
            Self::Python => "Python 3.9 with venv",
        }
    }

    /// What Debian and Ubuntu call it.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Postgres => "postgresql",
            Self::RabbitMq => "rabbitmq-server",
            Self::Python => "python3-venv",
        }
    }

    pub(crate) fn is_installed(self) -> bool {
        match self {
            Self::Postgres => postgres().is_ok(),
            Self::RabbitMq => rabbitmq().is_ok(),
            Self::Python => python_makes_environments(),
        }
    }
}

/// The one sentence on what to do.
pub(crate) fn missing(programs: &[Program]) -> Error {
    let listed =
        |name: fn(Program) -> &'static str| programs.iter().map(move |&program| name(program));
    let names: Vec<_> = listed(Program::name).collect();
    let packages: Vec<_> = listed(Program::package).collect();
    let (is, it) = match names.len() {
        1 => ("is", "it"),
        _ => ("are", "them"),
    };
    Error::new(format!(
        "{} {is} not installed here; install {it}, for example with: \
         sudo apt-get install --no-install-recommends {}",
        names.join(" and "),
        packages.join(" ")
    ))
}

/// The folder of PostgreSQL's server programs: the newest version that is installed, unless
/// PATH says which.
pub(crate) fn postgres() -> Result<PathBuf, Error> {
    let mut folders = path_folders();
    folders.extend(newest_first("/usr/lib/postgresql", "", "bin"));
    folders.extend(newest_first("/usr", "pgsql-", "bin"));
    folders.extend(pg_config());
    find(folders, &["initdb", "postgres", "pg_isready", "psql"])
        .ok_or_else(|| missing(&[Program::Postgres]))
}

/// The folder of RabbitMQ's own scripts. What Debian puts into PATH is a wrapper that insists on
/// the user `rabbitmq`.
pub(crate) fn rabbitmq() -> Result<PathBuf, Error> {
    let mut folders = vec![PathBuf::from("/usr/lib/rabbitmq/bin")];
    folders.extend(path_folders());
    find(folders, &["rabbitmq-server", "rabbitmqctl"])
        .filter(|_| find(path_folders(), &["erl", "epmd"]).is_some())
        .ok_or_else(|| missing(&[Program::RabbitMq]))
}

/// Debian's `python3` alone cannot: the means are in a package of their own.
fn python_makes_environments() -> bool {
    const ASK: &str = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 9))";
    let asked = Command::new("python3")
        .args(["-c", ASK])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success())
}

/// PATH for the servers: ours, and the usual folders, since cron and the like have few.
pub(crate) fn search_path() -> OsString {
    std::env::join_paths(path_folders()).unwrap_or_else(|_| OsString::from("/usr/bin:/bin"))
}

fn path_folders() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    std::env::split_paths(&path)
        .chain(usual.into_iter().map(PathBuf::from))
        .filter(|folder| folder.is_absolute())
        .collect()
}

fn find(folders: Vec<PathBuf>, programs: &[&str]) -> Option<PathBuf> {
    folders
        .into_iter()
        .find(|folder| programs.iter().all(|name| folder.join(name).is_file()))
}

/// `parent/<prefix><version>/<rest>`, the highest version first.
fn newest_first(parent: &str, prefix: &str, rest: &str) -> Vec<PathBuf> {
    let mut versions: Vec<_> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let version: u32 = name.to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((version, entry.path().join(rest)))
        })
        .collect();
    versions.sort();
    versions.into_iter().rev().map(|(_, path)| path).collect()
}

fn pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(Path::new(text.trim()).to_owned())
}
