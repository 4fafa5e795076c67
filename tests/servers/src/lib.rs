//! Throwaway servers: a PostgreSQL and a RabbitMQ that live in a temporary folder each, listen on
//! loopback only, at ports of their own, and are gone with their folder when they are dropped or
//! when the process that started them ends, in whatever way it ends.
//!
//! Several of them run beside each other and beside what the machine itself runs. They use the
//! programs that are installed ([`install_missing`] brings them), and nothing of the machine's configuration. Linux only: who
//! belongs to a server is read from `/proc`.
//!
//! ```no_run
//! # fn main() -> Result<(), handfast_servers::Error> {
//! let (postgres, rabbitmq) = handfast_servers::start_both()?;
//! println!("{}\n{}", postgres.url("postgres"), rabbitmq.url());
//! rabbitmq.freeze()?;
//! # Ok(())
//! # }
//! ```
//!
//! In reading order: `folder` and its guard (what makes them throwaway) · `port` · `programs`
//! (where they are) · `install` · the two servers · `small_disk`.

mod error;
mod folder;
mod install;
mod options;
mod port;
mod postgres;
mod programs;
mod rabbitmq;
mod run;
mod small_disk;
mod wait;

use std::thread;

pub use error::Error;
pub use folder::Folder;
pub use install::install_missing;
pub use options::Options;
pub use postgres::Postgres;
pub use programs::Program;
pub use rabbitmq::RabbitMq;
pub use small_disk::SmallDisk;

/// Starts one of each, at the same time.
///
/// # Errors
/// If one of them cannot be started; then the other is stopped.
pub fn start_both() -> Result<(Postgres, RabbitMq), Error> {
    thread::scope(|scope| {
        let rabbitmq = scope.spawn(RabbitMq::start);
        let postgres = Postgres::start();
        let rabbitmq = rabbitmq
            .join()
            .unwrap_or_else(|_| Err(Error::new("starting RabbitMQ panicked")));
        Ok((postgres?, rabbitmq?))
    })
}
