//! The one binary of Handfast. What it can do is in [`cli`].

mod cli;
#[cfg(feature = "demo")]
mod demo;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
