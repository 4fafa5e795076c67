//! Installs what is missing, on a machine where that is an ordinary thing to do: Debian or
//! Ubuntu, by root or by whoever may become root without a password.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::Uid;

use crate::{Error, Program, programs};

const SCRIPT: &str = include_str!("install.sh");
/// Held by the script.
const LOCK: &str = "/run/handfast-install.lock";

/// Installs those of the programs that are missing; no server is started. What `apt-get` prints
/// goes to standard error.
///
/// # Errors
/// If something is missing and cannot be installed; the error says what to do.
pub fn install_missing(programs: &[Program]) -> Result<(), Error> {
    wait_for_others()?;
    let missing = still_missing(programs);
    if missing.is_empty() {
        return Ok(());
    }
    let Some(mut installer) = installer() else {
        return Err(programs::missing(&missing));
    };
    let packages: Vec<_> = missing.iter().map(|program| program.package()).collect();
    let list = packages.join(" and ");
    eprintln!("installing {list} (no service of theirs is started)");
    let status = installer
        .args(["sh", "-c", SCRIPT, "install"])
        .args(&packages)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .map_err(Error::cannot(format!("install {list}")))?;
    if !status.success() {
        return Err(Error::new(format!(
            "installing {list} ended with {status}; what apt-get said is above"
        )));
    }
    match still_missing(&missing) {
        left if left.is_empty() => Ok(()),
        left => Err(programs::missing(&left)),
    }
}

/// What is half installed would be taken for installed.
fn wait_for_others() -> Result<(), Error> {
    match File::open(LOCK) {
        Ok(lock) => lock
            .lock_shared()
            .map_err(Error::cannot(format!("wait for {LOCK}"))),
        // Nobody has ever installed anything.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::cannot(format!("open {LOCK}"))(error)),
    }
}

fn still_missing(programs: &[Program]) -> Vec<Program> {
    let missing = |program: &Program| !program.is_installed();
    programs.iter().copied().filter(missing).collect()
}

/// What runs a command as root, if that is possible here without asking anybody.
fn installer() -> Option<Command> {
    if !Path::new("/etc/debian_version").exists() {
        return None;
    }
    if Uid::effective().is_root() {
        return Some(Command::new("env"));
    }
    let asked = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success()).then(|| {
        let mut sudo = Command::new("sudo");
        sudo.arg("-n");
        sudo
    })
}
