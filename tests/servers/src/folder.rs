//! A folder that is gone when its owner is, with whoever works in it.
//!
//! Every process of a server works in its folder (its current directory is there), so the folder
//! says who belongs to it. The guard is a small shell in a process group of its own, which holds
//! one end of a pipe; the other end is here. When this end closes, the guard ends the server and
//! removes the folder. That is the one way in which a server goes, whether it was dropped or this
//! process was killed.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::{Gid, Pid, Uid};

use crate::{Error, Options, wait};

const GUARD: &str = include_str!("guard.sh");
/// Longer than the guard's own patience.
const REMOVED_WITHIN: Duration = Duration::from_secs(30);
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// A temporary folder with a guard: it goes when this is dropped and also when this process is
/// killed, and with it whoever has their current directory in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    guard: Child,
}

impl Folder {
    /// Makes a folder in the system's temporary folder. When it goes, those who work in it have
    /// 10 s to end by themselves.
    ///
    /// # Errors
    /// If the folder cannot be made or its guard not be started.
    pub fn new(name: &str) -> Result<Self, Error> {
        Self::guarded(name, &std::env::temp_dir(), 10)
    }

    /// Makes the folder of a server, which has nobody else to end it.
    pub(crate) fn of_server(name: &str, options: &Options) -> Result<Self, Error> {
        let parent = options.within.clone().unwrap_or_else(std::env::temp_dir);
        Self::guarded(name, &parent, 0)
    }

    fn guarded(name: &str, parent: &Path, patience_s: u32) -> Result<Self, Error> {
        let path = tempfile::Builder::new()
            .prefix(&format!("handfast-{name}-"))
            .tempdir_in(parent)
            .and_then(|folder| folder.keep().canonicalize())
            .map_err(Error::cannot(format!(
                "make a folder in {}",
                parent.display()
            )))?;
        start_guard(&path, patience_s)
            .map_err(|error| {
                // It is empty; the error to report is the other one.
                let _ = fs::remove_dir(&path);
                Error::cannot("start sh as a guard")(error)
            })
            .map(|guard| Self { path, guard })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder to another user.
    pub(crate) fn give_to(&self, user: Uid, group: Gid) -> Result<(), Error> {
        chown(&self.path, Some(user.as_raw()), Some(group.as_raw()))
            .and_then(|()| fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700)))
            .map_err(Error::cannot(format!(
                "give {} to user {user}",
                self.path.display()
            )))
    }

    /// Kills whoever works here, as a power failure would, and waits until all are gone.
    pub(crate) fn kill_everyone(&self) -> Result<(), Error> {
        wait::until("the end of what was killed", KILLED_WITHIN, || {
            let left = self.who();
            for &pid in &left {
                // It may have gone by itself.
                let _ = signal::kill(pid, Signal::SIGKILL);
            }
            Ok(left.is_empty().then_some(()))
        })
    }

    /// Who works here. A zombie does not.
    fn who(&self) -> Vec<Pid> {
        let Ok(processes) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        processes
            .flatten()
            .filter(|process| {
                fs::read_link(process.path().join("cwd"))
                    .is_ok_and(|works_in| works_in.starts_with(&self.path))
            })
            .filter_map(|process| process.file_name().to_str()?.parse().ok())
            .map(Pid::from_raw)
            .collect()
    }

    /// Ends the server and removes the folder: lets go of the pipe, and waits for the guard.
    pub(crate) fn remove(&mut self) {
        drop(self.guard.stdin.take());
        let gone = wait::until("the guard's end", REMOVED_WITHIN, || {
            self.guard.try_wait().map_err(Error::cannot("wait for it"))
        });
        if let Err(error) = gone {
            eprintln!("{} may be left behind: {error}", self.path.display());
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.remove();
    }
}

fn start_guard(folder: &Path, patience_s: u32) -> io::Result<Child> {
    let mut guard = Command::new("sh")
        .args(["-c", GUARD, "handfast-servers-guard"])
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(pipe) = &mut guard.stdin {
        let folder = folder.as_os_str().as_bytes();
        pipe.write_all(&[patience_s.to_string().as_bytes(), b" ", folder, b"\n"].concat())?;
    }
    Ok(guard)
}

/// Sends a signal to one process.
pub(crate) fn send(signal: Signal, pid: u32) -> Result<(), Error> {
    let pid = i32::try_from(pid).map_err(|_| Error::new(format!("{pid} is no process id")))?;
    signal::kill(Pid::from_raw(pid), signal)
        .map_err(io::Error::from)
        .map_err(Error::cannot(format!("send {signal} to process {pid}")))
}
