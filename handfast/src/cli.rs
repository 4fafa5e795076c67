//! The command line: one subcommand per task, one line per error.
//!
//! Exit codes: 0 it worked, 1 it failed, 2 it was called wrongly. A second SIGTERM or Ctrl-C
//! ends `serve` at once with 128 and the number of the signal (143, 130). Whatever goes wrong
//! is one line `error: …` on standard error.

#[cfg(feature = "demo")]
mod demo;
mod migrate;
mod serve;
mod usage;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;

/// Called wrongly; 1 is left for what was called rightly and failed.
const USAGE: u8 = 2;

/// Reliable messages between services: nothing lost, nothing invented.
#[derive(Debug, clap::Parser)]
#[command(
    name = "handfast",
    version,
    after_help = "Example:\n  handfast serve --config handfast.toml"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the message service
    Serve(Box<serve::Args>),
    /// Bring the schema of the store up to date, or print it
    Migrate(migrate::Args),
    /// Pay, kill every process, and show that everything adds up
    #[cfg(feature = "demo")]
    Demo(demo::Args),
    /// One process of the demo
    #[cfg(feature = "demo")]
    #[command(name = crate::demo::SUBCOMMAND, hide = true)]
    DemoParty(demo::Party),
}

/// Why a command failed: one line that names what was attempted, the cause and the way out.
#[derive(Debug)]
struct Failure(String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Runs the command that the process was started with.
pub(crate) fn main() -> ExitCode {
    if let Err(error) = handfast_fail_points::arm_from_environment() {
        return fail(1, &format!("cannot arm the fail points: {error}"));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_run(&error),
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Migrate(args) => migrate::run(args),
        #[cfg(feature = "demo")]
        Command::Demo(args) => return demo::run(args),
        #[cfg(feature = "demo")]
        Command::DemoParty(party) => party.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(line)) => fail(1, &line),
    }
}

/// Help and version are answers; everything else is a call that cannot be understood.
fn not_run(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever closed the pipe has read enough.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            fail(USAGE, "no subcommand was given; try handfast --help")
        }
        _ => fail(USAGE, &usage::line(&error.to_string())),
    }
}

fn fail(code: u8, text: &str) -> ExitCode {
    let line: Vec<_> = text.lines().map(str::trim).collect();
    // If standard error is gone, the exit code still tells.
    let _ = writeln!(std::io::stderr(), "error: {}", line.join(" "));
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
