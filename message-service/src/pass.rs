//! Runs a pass: one run of a recurring job.
//!
//! A pass takes no input and may be repeated or left at any point without harm, so the same
//! loop serves all of them: it runs on a signal and on a period, never twice at once, until it
//! is stopped. The signal is only latency; the period finds what nobody signalled, and is the retry
//! after an error unless another one is given. An error is logged when it appears and when it goes away, not in every round.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often a pass runs at least that is told when there is something to do.
pub const QUIET: Duration = Duration::from_secs(30);

/// The wait before a pass is started again that a defect has ended.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// When a pass runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once: there was more to do than one run takes.
    Now,
    /// On the next signal, or when the period has passed.
    Signal,
    /// After this long, whatever is signalled: signals must not undo a back-off.
    NotBefore(Duration),
}

/// The period of a pass, spread so that passes which began together do not stay together.
#[derive(Debug)]
pub struct Pace {
    /// Between two runs of which nobody signals the second.
    quiet: Duration,
    /// After an error.
    retry: Duration,
    chance: StdRng,
}

impl Pace {
    /// How far a period may be moved to either side.
    const JITTER: f64 = 0.1;

    /// Runs every `period`, ±10 %; the seed repeats the jitter.
    pub fn new(period: Duration, seed: u64) -> Self {
        Self::when_told(period, period, seed)
    }

    /// Runs when it is signalled, every `quiet` if it is not, and `retry` after an error; ±10 %,
    /// too.
    pub fn when_told(quiet: Duration, retry: Duration, seed: u64) -> Self {
        Self {
            quiet,
            retry,
            chance: StdRng::seed_from_u64(seed),
        }
    }

    fn draw(&mut self, wait: Duration) -> Duration {
        let factor = self
            .chance
            .random_range(1.0 - Self::JITTER..=1.0 + Self::JITTER);
        wait.mul_f64(factor)
    }
}

/// Remembers what was logged last, so that a lasting error is one line and not one a second.
#[derive(Debug)]
pub struct Trouble {
    name: String,
    last: Option<String>,
}

impl Trouble {
    /// Nothing is wrong yet with what has this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            last: None,
        }
    }

    /// Takes note of how it went, logs a change, and passes the value on.
    pub fn note<T, E: Display>(&mut self, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => {
                if self.last.take().is_some() {
                    tracing::info!(pass = %self.name, "{} works again", self.name);
                }
                Some(value)
            }
            Err(error) => {
                let error = error.to_string();
                if self.last.as_ref() != Some(&error) {
                    tracing::warn!(
                        pass = %self.name, %error,
                        "{} failed and is retried: {error}", self.name
                    );
                    self.last = Some(error);
                }
                None
            }
        }
    }

    /// True while the last run failed.
    pub fn is_present(&self) -> bool {
        self.last.is_some()
    }
}

/// Runs the pass until `stop`. Stopping leaves a running pass at its next await: what it did
/// is durable, and what it did not do is found by the next run.
pub async fn run<Fut, E>(
    name: &str,
    mut pace: Pace,
    signal: &Notify,
    stop: &CancellationToken,
    mut pass: impl FnMut() -> Fut,
) where
    Fut: Future<Output = Result<Next, E>>,
    E: Display,
{
    let mut trouble = Trouble::new(name);
    loop {
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            result = pass() => result,
        };
        // A signal that came during the run is kept by `Notify`, so nothing that became due
        // after the run looked is missed.
        match trouble.note(result).unwrap_or(Next::Signal) {
            Next::Now => tokio::task::yield_now().await,
            Next::Signal if !trouble.is_present() => {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = signal.notified() => {}
                    () = tokio::time::sleep(pace.draw(pace.quiet)) => {}
                }
            }
            // Signals do not shorten the wait after an error either: what is broken would be
            // asked as often as work arrives.
            Next::Signal => pause(pace.draw(pace.retry), stop).await,
            Next::NotBefore(wait) => pause(wait, stop).await,
        }
    }
}

/// Runs a pass until `stop`, and again if a defect ended it: a service that serves and resends
/// nothing more, or forgets nothing more, would look well.
pub async fn kept<F>(
    name: &'static str,
    stop: CancellationToken,
    pass: impl Fn(CancellationToken) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    while !stop.is_cancelled() {
        if let Err(error) = tokio::spawn(pass(stop.clone())).await {
            tracing::error!(pass = name, %error, "{name} ended and is started again: {error}");
            pause(RESTART_AFTER, &stop).await;
        }
    }
}

async fn pause(wait: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = tokio::time::sleep(wait) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const NEVER: Duration = Duration::from_secs(86_400);

    #[tokio::test]
    async fn a_signal_during_a_run_causes_another_run() {
        let signal = Arc::new(Notify::new());
        let stop = CancellationToken::new();
        let runs = AtomicUsize::new(0);
        run("test", Pace::new(NEVER, 1), &signal, &stop, || async {
            match runs.fetch_add(1, Ordering::SeqCst) {
                0 => signal.notify_one(),
                _ => stop.cancel(),
            }
            Ok::<_, String>(Next::Signal)
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_run_that_has_more_to_do_runs_again_at_once() {
        let stop = CancellationToken::new();
        let runs = AtomicUsize::new(0);
        let quiet = Notify::new();
        run("test", Pace::new(NEVER, 1), &quiet, &stop, || async {
            if runs.fetch_add(1, Ordering::SeqCst) == 2 {
                stop.cancel();
            }
            Ok::<_, String>(Next::Now)
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn the_period_is_the_retry_after_an_error() {
        let stop = CancellationToken::new();
        let runs = AtomicUsize::new(0);
        let quiet = Notify::new();
        let pace = Pace::new(Duration::from_millis(1), 1);
        run("test", pace, &quiet, &stop, || async {
            if runs.fetch_add(1, Ordering::SeqCst) == 2 {
                stop.cancel();
            }
            Err::<Next, _>("disk full")
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_pass_that_a_defect_ended_is_started_again() {
        let stop = CancellationToken::new();
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        kept("test", stop, move |stop| {
            let runs = Arc::clone(&counted);
            async move {
                match runs.fetch_add(1, Ordering::SeqCst) {
                    0 => panic!("a defect"),
                    _ => stop.cancel(),
                }
            }
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn trouble_knows_when_it_is_over() {
        let mut trouble = Trouble::new("test");
        assert_eq!(trouble.note(Err::<(), _>("disk full")), None);
        assert!(trouble.is_present());
        assert_eq!(trouble.note(Ok::<_, String>(7)), Some(7));
        assert!(!trouble.is_present());
    }

    #[test]
    fn jitter_stays_within_a_tenth_and_repeats_with_its_seed() {
        let mut one = Pace::new(Duration::from_secs(10), 7);
        let mut two = Pace::new(Duration::from_secs(10), 7);
        for _ in 0..100 {
            let drawn = one.draw(one.quiet);
            assert!(drawn >= Duration::from_secs(9) && drawn <= Duration::from_secs(11));
            assert_eq!(drawn, two.draw(two.quiet));
        }
    }
}
