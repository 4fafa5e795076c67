//! A small disk, to be filled.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::error::Error;

/// A small file system in memory, gone with this value.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// Mounts one of this size, which needs root.
    ///
    /// # Errors
    /// Where it may not be mounted; `cargo xtask test` leaves its callers out there.
    pub fn mount(megabytes: u32) -> Result<Self, Error> {
        let folder = TempDir::with_prefix("handfast-disk-")
            .map_err(Error::cannot("make a folder for a disk"))?;
        // PostgreSQL may run as another user and has to find its folder in it.
        let options = format!("size={megabytes}m,mode=0755");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "handfast-test"])
            .arg(folder.path())
            .output();
        let why = match mounted {
            Ok(output) if output.status.success() => return Ok(Self { folder }),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        Err(Error::new(format!(
            "a small file system cannot be mounted here: {why}; run as root"
        )))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves not a single block free, also when something was freed since the last time, and
    /// returns the file to be removed.
    ///
    /// # Errors
    /// If it did not become full.
    pub fn fill(&self) -> Result<PathBuf, Error> {
        let filler = self.path().join("filler");
        let filled = Command::new("dd")
            .args(["if=/dev/zero", "bs=4096", "status=none"])
            .args(["oflag=append", "conv=notrunc"])
            .arg(format!("of={}", filler.display()))
            .output()
            .map_err(Error::cannot("run dd"))?;
        if filled.status.success() {
            return Err(Error::new("the disk took everything, so it is not small"));
        }
        Ok(filler)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, because a process that is being killed may still have a file open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
