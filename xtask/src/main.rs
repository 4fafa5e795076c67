//! Chores that are more than one cargo command.

mod leftovers;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

const HELP: &str = "\
Chores of the Handfast workspace

Usage: cargo xtask <CHORE>

Chores:
  test    Build everything and run every test: the light ones in parallel, then those that
          kill processes, one after the other; then see that nothing was left behind.
          Words after `--` go to the test programs: cargo xtask test -- payment

Example:
  cargo xtask test";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let chore = arguments.next();
    let rest: Vec<_> = arguments.collect();
    match (chore.as_deref(), rest.split_first()) {
        (Some("test"), None) => report(test(&[])),
        (Some("test"), Some((dashes, words))) if dashes == "--" => report(test(words)),
        (Some("test"), Some((help, []))) if help == "--help" => help_text(),
        (Some("--help" | "-h" | "help"), _) => help_text(),
        (None, _) => usage("no chore was named"),
        (Some(other), _) => usage(&format!(
            "there is no chore `{other}`, or not with these words"
        )),
    }
}

/// Every test there is.
fn test(words: &[String]) -> Result<(), String> {
    let began = Instant::now();
    let handfast = target_folder().join("debug").join("handfast");
    // One selection of packages for all steps, so that nothing is compiled twice.
    cargo(&["test", "--workspace", "--no-run"], &[], &handfast)?;
    cargo(&["test", "--workspace"], words, &handfast)?;
    // What kills processes and fills disks would disturb the others and itself.
    let mut serial = vec!["--test-threads=1".to_owned()];
    serial.extend_from_slice(words);
    cargo(
        &["test", "--workspace", "--test", "crash"],
        &serial,
        &handfast,
    )?;
    leftovers::none_of(&handfast)?;
    println!(
        "every test passed in {} s, and nothing was left behind",
        began.elapsed().as_secs()
    );
    Ok(())
}

fn cargo(step: &[&str], words: &[String], handfast: &std::path::Path) -> Result<(), String> {
    let line = format!("cargo {}", step.join(" "));
    eprintln!("== {line}");
    let mut command = Command::new(env!("CARGO"));
    command.args(step).env("HANDFAST_BIN", handfast);
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

fn report(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

fn help_text() -> ExitCode {
    // Whoever closed the pipe has read enough.
    let _ = writeln!(std::io::stdout(), "{HELP}");
    ExitCode::SUCCESS
}

fn usage(why: &str) -> ExitCode {
    eprintln!("error: {why}; try cargo xtask --help");
    ExitCode::from(2)
}
