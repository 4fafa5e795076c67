//! What is shown while it runs: one line that is drawn again on a terminal, a line now and
//! then elsewhere. It goes to standard error; standard output is for the result.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::tally::Tally;

const REDRAW: Duration = Duration::from_millis(100);
const PLAIN_LINE: Duration = Duration::from_secs(2);
/// Back to the first column, and nothing behind it.
const CLEAR: &str = "\r\x1b[K";

/// The task that shows; it ends, and wipes its line, when it is dropped.
pub(crate) struct Progress {
    _task: AbortOnDropHandle<()>,
    is_terminal: bool,
}

impl Progress {
    /// Begins to show.
    pub(crate) fn start(tally: &Arc<Tally>, orders: usize, began: Instant) -> Self {
        let is_terminal = stderr().is_terminal();
        let tally = Arc::clone(tally);
        let task = tokio::spawn(async move {
            let mut ticks = interval(if is_terminal { REDRAW } else { PLAIN_LINE });
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // The first tick is at once, when there is nothing to say.
            ticks.tick().await;
            loop {
                ticks.tick().await;
                let line = line(&tally, orders, began.elapsed());
                // If nobody can read it, the run goes on all the same.
                let _ = if is_terminal {
                    write!(stderr(), "{CLEAR}{line}").and_then(|()| stderr().flush())
                } else {
                    writeln!(stderr(), "{line}")
                };
            }
        });
        Self {
            _task: AbortOnDropHandle::new(task),
            is_terminal,
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal {
            // As above.
            let _ = write!(stderr(), "{CLEAR}").and_then(|()| stderr().flush());
        }
    }
}

/// Short enough for a narrow terminal, where a line that wraps cannot be drawn again.
fn line(tally: &Tally, orders: usize, elapsed: Duration) -> String {
    let in_flight = tally.in_flight.load(Ordering::Relaxed);
    let doing = if tally.settled() < orders as u64 {
        format!("{in_flight} in flight")
    } else {
        "delivering".to_owned()
    };
    format!(
        "{:>5.1} s  {} paid, {} refused of {orders}, {doing}, {} killed",
        elapsed.as_secs_f64(),
        tally.paid.load(Ordering::Relaxed),
        tally.refused.load(Ordering::Relaxed),
        tally.fallen().len()
    )
}
