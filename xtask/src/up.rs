//! `cargo xtask up`: the same servers, to play with.

use std::io::Write as _;

use handfast_servers::{Program, install_missing, start_both};
use nix::sys::signal::{SigSet, Signal};

use crate::progress;

pub(crate) fn up() -> Result<(), String> {
    // Held back until they are waited for below: whatever has started by then is stopped in good
    // order. What is started here gets them as usual.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .map_err(|error| format!("cannot hold back signals: {error}"))?;
    install_missing(&[Program::Postgres, Program::RabbitMq]).map_err(|error| error.to_string())?;
    let (postgres, rabbitmq) = progress::shown("PostgreSQL and RabbitMQ", start_both)
        .map_err(|error| error.to_string())?;
    postgres
        .sql("postgres", "CREATE DATABASE handfast")
        .map_err(|error| error.to_string())?;
    say(
        &postgres.admin_url(),
        &postgres.url("handfast"),
        &rabbitmq.url(),
    )
    .map_err(|error| format!("cannot say where they are: {error}"))?;
    let signal = signals
        .wait()
        .map_err(|error| format!("cannot wait for Ctrl-C: {error}"))?;
    eprintln!("{signal}: stopping them and removing what they hold");
    Ok(())
}

/// The whole of it at once, since it may be read through a pipe.
fn say(postgres: &str, store: &str, broker: &str) -> std::io::Result<()> {
    let mut output = std::io::stdout();
    write!(
        output,
        "PostgreSQL and RabbitMQ are up. Ctrl-C stops them and removes all that they hold.

{postgres}
{broker}

The demo on them:
  cargo run --release -- demo --store {postgres} --broker {broker}

The service on them, with these two lines under [server] in handfast.toml:
  store = \"{store}\"
  broker = \"{broker}\"
  cargo run --release -- serve --config handfast.toml
"
    )?;
    output.flush()
}
