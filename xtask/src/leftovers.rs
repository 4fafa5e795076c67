//! Whether the tests left a process or a file behind.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// What was killed a moment ago may need this long to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Fails if a process still runs the program that the tests started, or has anything to do with
/// the folder that was their temporary one, or if something lies in that folder.
pub(crate) fn none_of(program: &Path, folder: &Path) -> Result<(), String> {
    let program = program.canonicalize().map_err(|error| {
        format!(
            "cannot find the tested program {}: {error}",
            program.display()
        )
    })?;
    let began = Instant::now();
    loop {
        let processes = processes(&program, folder)?;
        if processes.is_empty() {
            break;
        }
        if began.elapsed() > GONE_WITHIN {
            let list = processes.join(", ");
            return Err(format!("the tests left processes behind: {list}"));
        }
        std::thread::yield_now();
    }
    let files: Vec<_> = fs::read_dir(folder)
        .map_err(|error| format!("cannot read {}: {error}", folder.display()))?
        .flatten()
        .map(|entry| entry.path().display().to_string())
        .collect();
    if files.is_empty() {
        Ok(())
    } else {
        Err(format!("the tests left files behind: {}", files.join(", ")))
    }
}

/// The processes in question, each as its id and its command.
fn processes(program: &Path, folder: &Path) -> Result<Vec<String>, String> {
    let processes = fs::read_dir("/proc")
        .map_err(|error| format!("cannot look for processes that were left behind: {error}"))?;
    Ok(processes
        .flatten()
        .map(|entry| entry.path())
        .filter(|process| belongs(process, program, folder))
        .map(|process| {
            let id = process.file_name().unwrap_or_default().to_string_lossy();
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            format!("{id} ({})", name.trim())
        })
        .collect())
}

fn belongs(process: &Path, program: &Path, folder: &Path) -> bool {
    let is_at = |link: &str, place: &Path| {
        fs::read_link(process.join(link)).is_ok_and(|at| at.starts_with(place))
    };
    let names = |file: &str| {
        let needle = folder.as_os_str().as_bytes();
        fs::read(process.join(file))
            .is_ok_and(|text| text.windows(needle.len()).any(|part| part == needle))
    };
    // PostgreSQL writes over its environment, but works in its folder.
    is_at("exe", program) || is_at("cwd", folder) || names("cmdline") || names("environ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_seen_by_its_program_place_words_or_environment() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let other = Path::new("/no/such/program");
        let seen = |program: &Path| processes(program, &folder).unwrap().len();
        assert_eq!(seen(other), 0);

        let named = folder.join("file").display().to_string();
        let mut by_place = cat();
        by_place.current_dir(&folder);
        let mut by_word = cat();
        by_word.arg0(&named);
        let mut by_environment = cat();
        by_environment.env("ANY", &named);
        for mut command in [by_place, by_word, by_environment] {
            let child = Waiting::start(&mut command);
            assert_eq!(seen(other), 1, "{command:?}");
            drop(child);
            assert_eq!(seen(other), 0, "{command:?}");
        }

        let own = std::env::current_exe().unwrap();
        assert!(seen(&own) > 0);
    }

    #[test]
    fn a_file_that_was_left_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, "").unwrap();
        let left = none_of(&program, folder.path()).unwrap_err();
        assert!(left.ends_with("/program"), "{left}");
    }

    /// Waits for its standard input to end.
    fn cat() -> Command {
        let mut cat = Command::new("cat");
        cat.stdin(Stdio::piped()).stdout(Stdio::null());
        cat
    }

    struct Waiting(Child);

    impl Waiting {
        fn start(command: &mut Command) -> Self {
            Self(command.spawn().unwrap())
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            self.0.wait().unwrap();
        }
    }
}
