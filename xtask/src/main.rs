//! Chores that are more than one cargo command.

mod leftovers;
mod progress;
mod small_disk;
mod test;
mod up;

use std::io::Write as _;
use std::process::ExitCode;

const HELP: &str = "\
Chores of the Handfast workspace

Usage: cargo xtask <CHORE>

Chores:
  test    Build everything and run every test: the light ones in parallel, then those that
          kill processes, one after the other; then see that nothing was left behind.
          Words after `--` go to the test programs. Tests that fill a small disk need root to
          mount it; without it they are skipped, and the last line says how many
  up      Start a PostgreSQL and a RabbitMQ to play with, until Ctrl-C

Both need PostgreSQL and RabbitMQ installed, and test needs Python (3.9 or later, with venv); on
Debian and Ubuntu they install what is missing if they may.
The servers are throwaway ones: on loopback, at free ports, in temporary folders. To test on
others, name them in HANDFAST_TEST_POSTGRES and HANDFAST_TEST_AMQP.

Examples:
  cargo xtask test
  cargo xtask test -- payment
  cargo xtask up";

const HELP_OF_UP: &str = "\
Start a PostgreSQL and a RabbitMQ to play with, print their URLs (each on a line of its own) and
what to do with them, and stop them on Ctrl-C or SIGTERM. Nothing of them is left.

Usage: cargo xtask up

Example:
  cargo xtask up";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let chore = arguments.next();
    let rest: Vec<_> = arguments.collect();
    let rest: Vec<_> = rest.iter().map(String::as_str).collect();
    match (chore.as_deref(), rest.as_slice()) {
        (Some("test"), []) => report(test::test(&[])),
        (Some("test"), ["--", words @ ..]) => report(test::test(words)),
        (Some("up"), []) => report(up::up()),
        (Some("up"), ["--help" | "-h"]) => help_text(HELP_OF_UP),
        (Some("test"), ["--help" | "-h"]) | (Some("--help" | "-h" | "help"), _) => help_text(HELP),
        (None, _) => usage("no chore was named"),
        (Some(other), _) => usage(&format!(
            "there is no chore `{other}`, or not with these words"
        )),
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

fn help_text(text: &str) -> ExitCode {
    // Whoever closed the pipe has read enough.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}

fn usage(why: &str) -> ExitCode {
    eprintln!("error: {why}; try cargo xtask --help");
    ExitCode::from(2)
}
