//! `cargo xtask test`: every test there is, with the servers they need.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use handfast_servers::{Folder, Options, Postgres, Program, RabbitMq, install_missing};

use crate::{leftovers, progress, small_disk};

const POSTGRES: &str = "HANDFAST_TEST_POSTGRES";
const AMQP: &str = "HANDFAST_TEST_AMQP";
/// What kills processes, fills disks and starts servers would disturb the others and itself.
const SERIAL: [&str; 12] = [
    "test",
    "--workspace",
    "--test",
    "crash",
    "--test",
    "postgres",
    "--test",
    "bad_days",
    "--test",
    "servers",
    "--test",
    "up",
];
const LIGHT: [&str; 2] = ["test", "--workspace"];

type Variables = Vec<(&'static str, OsString)>;

pub(crate) fn test(words: &[&str]) -> Result<(), String> {
    let began = Instant::now();
    let handfast = target_folder().join("debug").join("handfast");
    let mut programs = wanted();
    // In which the wire contract is tried out.
    programs.push(Program::Python);
    install_missing(&programs).map_err(|error| error.to_string())?;
    let folder = Folder::new("test").map_err(|error| error.to_string())?;
    // PostgreSQL, which may run as another user, has its folder in this one.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))
        .map_err(|error| format!("cannot open {} to all: {error}", folder.path().display()))?;
    let skipped = small_disk::tests_to_skip(folder.path())?;
    run(&handfast, folder.path(), words, skipped)?;
    leftovers::none_of(&handfast, folder.path())?;
    println!("{}", result(began.elapsed().as_secs(), skipped.len()));
    Ok(())
}

/// The last line. Whoever reads nothing else must not take what was skipped for passed.
fn result(seconds: u64, skipped: usize) -> String {
    let nothing_left = "nothing was left behind";
    match skipped {
        0 => format!("every test passed in {seconds} s, and {nothing_left}"),
        _ => format!(
            "every test passed in {seconds} s, {skipped} skipped: a small file system cannot be \
             mounted here, run as root; {nothing_left}"
        ),
    }
}

fn run(handfast: &Path, folder: &Path, words: &[&str], skipped: &[&str]) -> Result<(), String> {
    let mut variables = vec![
        ("HANDFAST_BIN", handfast.as_os_str().to_owned()),
        // Whatever a test makes is made there, so that it can be seen whether it went.
        ("TMPDIR", folder.as_os_str().to_owned()),
    ];
    let servers = thread::scope(|scope| {
        let starting = scope.spawn(|| Servers::start(folder));
        // One selection of packages for all steps, so that nothing is compiled twice.
        let compiled = [&LIGHT[..], &SERIAL]
            .into_iter()
            .try_for_each(|step| cargo(&[step, &["--no-run"]].concat(), &[], &variables[..1]));
        let servers = progress::shown("PostgreSQL and RabbitMQ", || starting.join())
            .unwrap_or_else(|_| Err("starting the servers panicked".to_owned()));
        compiled.and(servers)
    })?;
    variables.extend(servers.variables());
    cargo(&LIGHT, words, &variables)?;
    let skip = small_disk::words(skipped);
    cargo(
        &SERIAL,
        &[&["--test-threads=1"], skip.as_slice(), words].concat(),
        &variables,
    )
}

/// The servers that the caller has not named.
fn wanted() -> Vec<Program> {
    [(POSTGRES, Program::Postgres), (AMQP, Program::RabbitMq)]
        .into_iter()
        .filter(|(variable, _)| std::env::var_os(variable).is_none_or(|url| url.is_empty()))
        .map(|(_, program)| program)
        .collect()
}

/// The servers of the run.
struct Servers {
    postgres: Option<Postgres>,
    rabbitmq: Option<RabbitMq>,
}

impl Servers {
    fn start(folder: &Path) -> Result<Self, String> {
        let options = Options::new().within(folder);
        let wanted = wanted();
        let (postgres, rabbitmq) = thread::scope(|scope| {
            let rabbitmq = scope.spawn(|| {
                let wanted = wanted.contains(&Program::RabbitMq);
                wanted.then(|| RabbitMq::start_with(&options)).transpose()
            });
            let postgres = wanted.contains(&Program::Postgres);
            let postgres = postgres.then(|| Postgres::start_with(&options)).transpose();
            (postgres, rabbitmq.join())
        });
        Ok(Self {
            postgres: postgres.map_err(|error| error.to_string())?,
            rabbitmq: rabbitmq
                .map_err(|_| "starting RabbitMQ panicked")?
                .map_err(|error| error.to_string())?,
        })
    }

    /// How the tests find them.
    fn variables(&self) -> Variables {
        let postgres = self.postgres.as_ref().map(Postgres::admin_url);
        let rabbitmq = self.rabbitmq.as_ref().map(RabbitMq::url);
        [(POSTGRES, postgres), (AMQP, rabbitmq)]
            .into_iter()
            .filter_map(|(variable, url)| Some((variable, OsString::from(url?))))
            .collect()
    }
}

fn cargo(step: &[&str], words: &[&str], variables: &[(&str, OsString)]) -> Result<(), String> {
    let line = format!("cargo {}", step.join(" "));
    eprintln!("== {line}");
    let mut command = Command::new(env!("CARGO"));
    command
        .args(step)
        .envs(variables.iter().map(|(name, value)| (name, value)));
    if !words.is_empty() {
        command.arg("--").args(words);
    }
    let status = command
        .status()
        .map_err(|error| format!("cannot run `{line}`: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`{line}` failed with {status}"))
    }
}

fn target_folder() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join("target"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_skipped_is_said_in_the_last_line() {
        assert!(!result(7, 0).contains("skipped"));
        let line = result(7, 4);
        assert!(line.starts_with("every test passed in 7 s, 4 skipped: "));
        assert_eq!(line.lines().count(), 1);
    }
}
