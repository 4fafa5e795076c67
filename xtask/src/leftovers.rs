//! Whether the tests left a process behind.

use std::fs;
use std::path::Path;

/// Fails if a process still runs the program that the tests started.
pub(crate) fn none_of(program: &Path) -> Result<(), String> {
    let program = program.canonicalize().map_err(|error| {
        format!(
            "cannot find the tested program {}: {error}",
            program.display()
        )
    })?;
    let Ok(processes) = fs::read_dir("/proc") else {
        eprintln!("skipped: there is no /proc here to look for processes that were left behind");
        return Ok(());
    };
    let left: Vec<_> = processes
        .flatten()
        .filter(|entry| fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "the tests left processes behind: {}",
            left.join(", ")
        ))
    }
}
