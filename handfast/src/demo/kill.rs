//! Who dies when: one task per process lives through its planned lives.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Error;
use super::home::Home;
use super::party::{Died, Party};
use super::plan::{Death, Life, Plan, Role};
use super::tally::{Fallen, Tally};

/// How far the run is, as far as deaths depend on it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stage {
    /// Orders that have their final answer.
    pub(crate) settled: u64,
    /// Everything is over: who was to die and has not, dies now.
    pub(crate) last_call: bool,
}

impl Stage {
    fn is_time_for(&self, life: &Life) -> bool {
        self.last_call || life.at.is_some_and(|at| self.settled >= at)
    }
}

/// The four processes. Dropping it kills them.
pub(crate) struct Crew {
    home: Arc<Home>,
    /// One per process, in the order of [`Role::ALL`]: asks it to stop.
    stops: [CancellationToken; 4],
    /// Says of each process that its planned deaths are over.
    mortal: watch::Receiver<usize>,
    failures: mpsc::Receiver<Error>,
    halt: CancellationToken,
    tasks: JoinSet<()>,
    stopped: [CancellationToken; 4],
}

impl Crew {
    /// Starts the processes and lets them live as planned.
    pub(crate) fn start(
        home: &Arc<Home>,
        plan: &Plan,
        stage: &watch::Receiver<Stage>,
        tally: &Arc<Tally>,
    ) -> Self {
        let (living, mortal) = watch::channel(Role::ALL.len());
        let (fail, failures) = mpsc::channel(Role::ALL.len());
        let living = Arc::new(living);
        let halt = CancellationToken::new();
        let stops = Role::ALL.map(|_| CancellationToken::new());
        let stopped = Role::ALL.map(|_| CancellationToken::new());
        let mut tasks = JoinSet::new();
        for role in Role::ALL {
            let lives = Lives {
                role,
                home: Arc::clone(home),
                stage: stage.clone(),
                tally: Arc::clone(tally),
                mortal: Arc::clone(&living),
                stop: stops[role as usize].clone(),
                halt: halt.clone(),
            };
            let planned = plan.lives(role).to_vec();
            let (fail, stopped) = (fail.clone(), stopped[role as usize].clone());
            tasks.spawn(async move {
                if let Err(error) = lives.live(&planned).await {
                    // There is room for one error of each process.
                    let _ = fail.try_send(error);
                }
                stopped.cancel();
            });
        }
        Self {
            home: Arc::clone(home),
            stops,
            mortal,
            failures,
            halt,
            tasks,
            stopped,
        }
    }

    /// Waits until something ends that was not to end. Otherwise it never returns.
    pub(crate) async fn failed(&mut self) -> Error {
        match self.failures.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }

    /// True once every planned death has happened.
    pub(crate) fn is_past_all_deaths(&self) -> bool {
        *self.mortal.borrow() == 0
    }

    /// Stops the processes, the service last, because the others still talk to it.
    pub(crate) async fn stop(&mut self) -> Result<(), Error> {
        for group in [
            &[Role::Payment] as &[Role],
            &[Role::Accounting, Role::Points],
            &[Role::Service],
        ] {
            for role in group {
                self.stops[*role as usize].cancel();
            }
            for role in group {
                self.stopped[*role as usize].cancelled().await;
            }
        }
        self.failures.try_recv().map_or(Ok(()), Err)
    }

    /// Ends what still lives and reaps it. Afterwards no file of the folder is open.
    pub(crate) async fn end(mut self) {
        self.halt.cancel();
        while self.tasks.join_next().await.is_some() {}
        drop(self.home);
    }
}

/// What the task of one process needs.
struct Lives {
    role: Role,
    home: Arc<Home>,
    stage: watch::Receiver<Stage>,
    tally: Arc<Tally>,
    mortal: Arc<watch::Sender<usize>>,
    stop: CancellationToken,
    halt: CancellationToken,
}

impl Lives {
    async fn live(mut self, planned: &[Life]) -> Result<(), Error> {
        for life in planned {
            if !self.live_and_die(life).await? {
                return Ok(());
            }
        }
        let mut party = Party::start(self.role, &self.home, None)?;
        self.mortal.send_modify(|mortal| *mortal -= 1);
        tokio::select! {
            died = party.aborted(&self.home) => Err(unplanned(self.role, died)),
            () = self.stop.cancelled() => self.wind_down(party).await,
            () = self.halt.cancelled() => {
                party.end().await;
                Ok(())
            }
        }
    }

    /// Asks the process to stop. Being asked, it may still be told to end at once.
    async fn wind_down(&self, mut party: Party) -> Result<(), Error> {
        let stopping = party.stop(&self.home);
        if let Some(stopped) = self.halt.run_until_cancelled(stopping).await {
            return stopped;
        }
        party.end().await;
        Ok(())
    }

    /// One life up to its death and the time after it. False if there is to be no other.
    async fn live_and_die(&mut self, life: &Life) -> Result<bool, Error> {
        let mut party = Party::start(self.role, &self.home, Some(life.death))?;
        let stage = &mut self.stage;
        // False if the run is over, and nobody tells any more.
        let time = async {
            stage
                .wait_for(|stage| stage.is_time_for(life))
                .await
                .is_ok()
        };
        let died = tokio::select! {
            died = party.aborted(&self.home) => match died? {
                Died::Killed => return Err(unplanned(self.role, Ok(Died::Killed))),
                Died::Aborted => Died::Aborted,
            },
            goes_on = time => {
                if !goes_on {
                    party.end().await;
                    return Ok(false);
                }
                party.kill(&self.home).await?
            }
            // It did not come to the planned death: too little has happened in this run.
            () = self.stop.cancelled() => {
                self.wind_down(party).await?;
                return Ok(false);
            }
            () = self.halt.cancelled() => {
                party.end().await;
                return Ok(false);
            }
        };
        let at = match (died, life.death) {
            (Died::Aborted, Death::Abort { point, .. }) => Some(point),
            (Died::Aborted, Death::Kill) => return Err(unplanned(self.role, Ok(died))),
            (Died::Killed, _) => None,
        };
        let settled = self.stage.borrow().settled;
        let role = self.role;
        self.tally.bury(Fallen { role, at, settled });
        tokio::select! {
            () = sleep(Duration::from_millis(life.away_ms)) => Ok(true),
            () = self.stop.cancelled() => Ok(false),
            () = self.halt.cancelled() => Ok(false),
        }
    }
}

/// A death that nobody has planned.
fn unplanned(role: Role, died: Result<Died, Error>) -> Error {
    match died {
        Ok(Died::Killed) => Error::Unplanned {
            role,
            how: "SIGKILL from somebody else",
        },
        Ok(Died::Aborted) => Error::Unplanned {
            role,
            how: "an abort where nothing was armed",
        },
        Err(error) => error,
    }
}
