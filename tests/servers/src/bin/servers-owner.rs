//! Starts one of each server, says where they are, and then waits for ever: to be killed by a
//! test.

use std::error::Error;
use std::io::Write as _;

fn main() -> Result<(), Box<dyn Error>> {
    let (postgres, rabbitmq) = handfast_servers::start_both()?;
    let mut output = std::io::stdout();
    for folder in [postgres.folder(), rabbitmq.folder()] {
        writeln!(output, "{}", folder.display())?;
    }
    output.flush()?;
    loop {
        std::thread::park();
    }
}
