//! Some tests fill a disk, a small one that they mount themselves. Where that is not allowed they
//! would fail, so they are left out, and whoever reads the last line learns how many.

use std::fs;
use std::path::Path;
use std::process::Command;

/// All of these tests, as their test programs name them.
pub(crate) const TESTS: [&str; 4] = [
    "broken::a_full_disk_is_unavailable_until_there_is_room",
    "disk_full::a_full_disk_is_unavailable_and_heals_by_itself",
    "disk_full::a_prepare_that_found_the_disk_full_succeeds_later_without_a_restart",
    "postgres_refuses::a_server_without_room_is_unavailable_until_it_has_some",
];

/// Those that cannot be run here, which is all of them or none. Mounts a small file system in this
/// folder to see, and takes it away again.
pub(crate) fn tests_to_skip(folder: &Path) -> Result<&'static [&'static str], String> {
    let Some(why) = refusal(folder)? else {
        return Ok(&[]);
    };
    eprintln!("a small file system cannot be mounted here, run as root: {why}");
    for test in TESTS {
        eprintln!("  skipped: {test}");
    }
    Ok(&TESTS)
}

/// What a test program is told so that it leaves them out.
pub(crate) fn words<'a>(skipped: &[&'a str]) -> Vec<&'a str> {
    skipped.iter().flat_map(|test| ["--skip", *test]).collect()
}

/// Why mounting is refused, if it is.
fn refusal(folder: &Path) -> Result<Option<String>, String> {
    let place = folder.join("small-disk");
    let failed = |error| format!("cannot try to mount in {}: {error}", place.display());
    fs::create_dir(&place).map_err(failed)?;
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=1m", "handfast-test"]);
    let refusal = refused(mount.arg(&place));
    if refusal.is_none()
        && let Some(why) = refused(Command::new("umount").arg(&place))
    {
        return Err(format!("cannot unmount {}: {why}", place.display()));
    }
    fs::remove_dir(&place).map_err(failed)?;
    Ok(refusal)
}

/// What a command says against what it was to do.
fn refused(command: &mut Command) -> Option<String> {
    match command.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Where tests are that run one after the other.
    const SERIAL_TESTS: [&str; 3] = [
        "tests/tests/crash",
        "tests/tests/bad_days",
        "message-service/tests/postgres",
    ];

    #[test]
    fn a_test_that_mounts_a_small_disk_is_in_the_list_and_no_other() {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = Vec::new();
        for folder in SERIAL_TESTS {
            for file in fs::read_dir(root.join(folder)).unwrap() {
                let path = file.unwrap().path();
                let module = path.file_stem().unwrap().to_string_lossy().into_owned();
                let text = fs::read_to_string(&path).unwrap();
                let names = tests_that_mount(&text);
                found.extend(names.map(|name| format!("{module}::{name}")));
            }
        }
        found.sort();
        assert_eq!(found, TESTS);
    }

    /// The function that stands before each call of `mount`.
    fn tests_that_mount(text: &str) -> impl Iterator<Item = &str> {
        text.match_indices("SmallDisk::mount(").map(|(at, _)| {
            let (_, name) = text[..at].rsplit_once("fn ").unwrap();
            name.split_once('(').unwrap().0
        })
    }

    #[test]
    fn each_of_them_is_skipped_by_its_name() {
        assert_eq!(words(&[]), [""; 0]);
        assert_eq!(words(&["a::b", "c"]), ["--skip", "a::b", "--skip", "c"]);
    }

    #[test]
    fn trying_to_mount_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        tests_to_skip(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_command_that_is_refused_or_missing_says_why() {
        assert_eq!(refused(&mut Command::new("true")), None);
        let mut refusing = Command::new("sh");
        refusing.args(["-c", "echo not you >&2; exit 32"]);
        assert_eq!(refused(&mut refusing).unwrap(), "not you");
        assert!(refused(&mut Command::new("/no/such/program")).is_some());
    }
}
