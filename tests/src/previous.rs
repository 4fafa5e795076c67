//! The program as it was: the commit that `tests/previous-version` names, built from this
//! repository's history.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::world::handfast;

/// The previous program. The first call builds it, which takes minutes and says so on stderr.
pub async fn previous() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let built = tokio::task::spawn_blocking(|| BUILT.get_or_init(build).clone());
    built.await.expect("it is built")
}

fn build() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let commit = fs::read_to_string(here.join("previous-version"));
    let commit = commit.expect("tests/previous-version");
    let commit = commit.trim();
    // A folder of its own: cargo cannot tell two copies of one workspace apart.
    let target = handfast().ancestors().nth(2).map(Path::to_owned);
    let folder = target.expect("target").join("previous").join(commit);
    let source = folder.join("source");
    if !source.exists() {
        unpack(&here.join(".."), commit, &source);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--locked", "--package", "handfast"])
        .current_dir(&source)
        .env("CARGO_TARGET_DIR", folder.join("build"))
        // It is built once and not measured.
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    eprintln!("building the previous version, {commit}");
    let built = command.status().expect("cargo runs");
    assert!(built.success(), "cannot build {commit}: {built}");
    folder.join("build").join("debug").join("handfast")
}

/// Puts the files of a commit into a folder, all or none.
fn unpack(repository: &Path, commit: &str, folder: &Path) {
    let half = folder.with_extension("half");
    // What an earlier try has left.
    let _ = fs::remove_dir_all(&half);
    fs::create_dir_all(&half).expect("a folder under target");
    let mut archive = Command::new("git")
        .arg("-C")
        .arg(repository)
        .args(["archive", "--format=tar", commit])
        .stdout(Stdio::piped())
        .spawn()
        .expect("git runs");
    let files = archive.stdout.take().expect("it is piped");
    let unpacked = Command::new("tar")
        .args(["-x", "-m", "-C"])
        .arg(&half)
        .stdin(files)
        .status()
        .expect("tar runs");
    let archived = archive.wait().expect("git ends");
    assert!(
        archived.success() && unpacked.success(),
        "{commit}, which tests/previous-version names, is not in this clone; fetch the whole \
         history, for example with `git fetch --unshallow`"
    );
    fs::rename(&half, folder).expect("the folder can be renamed");
}
