//! Where Handfast is: one address or several, all equally good.
//!
//! An address at which a call failed is out of turn until it says SERVING again. If none is in
//! turn, all of them are tried: the calls then say what is wrong.

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::v1::messages_client::MessagesClient;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::error::ConnectError;
use crate::pace::Pace;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// For the question whether an address is serving.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(1);
/// Each has a connection and a task per verb.
const MAX_ENDPOINTS: usize = 16;

/// All addresses of one producer.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) all: Vec<MessagesClient<Channel>>,
    turns: watch::Sender<Vec<Turn>>,
    /// Cancelled when the producer is gone.
    pub(crate) stop: CancellationToken,
}

/// What is known of one address.
#[derive(Clone, Copy, Debug)]
struct Turn {
    in_turn: bool,
    /// A call has succeeded since it was last out of turn.
    worked: bool,
}

impl Endpoints {
    /// Reads addresses that are separated by commas. Connections are made when they are first
    /// needed, and whenever they were lost. All of it ends when the guard is dropped.
    pub(crate) fn read(urls: &str) -> Result<(Arc<Self>, DropGuard), ConnectError> {
        let mut known: Vec<&str> = Vec::new();
        for url in urls.split(',').map(str::trim) {
            if !known.contains(&url) {
                known.push(url);
            }
        }
        if known.len() > MAX_ENDPOINTS {
            return Err(ConnectError::TooMany { given: known.len() });
        }
        let channels = known.into_iter().map(channel);
        let channels = channels.collect::<Result<Vec<_>, _>>()?;
        let new = Turn {
            in_turn: true,
            worked: true,
        };
        let turns = watch::Sender::new(vec![new; channels.len()]);
        let stop = CancellationToken::new();
        if channels.len() > 1 {
            for (number, channel) in channels.iter().cloned().enumerate() {
                let (turns, stop) = (turns.clone(), stop.clone());
                tokio::spawn(async move {
                    let asking = bring_back(turns, number, channel);
                    stop.run_until_cancelled(asking).await
                });
            }
        }
        let endpoints = Self {
            all: channels.into_iter().map(MessagesClient::new).collect(),
            turns,
            stop: stop.clone(),
        };
        Ok((Arc::new(endpoints), stop.drop_guard()))
    }

    /// Waits until this address may be sent to, or `false` if it may not be any more.
    pub(crate) async fn until(&self, number: usize, may: bool) {
        let mut turns = self.turns.subscribe();
        // Fails only if the sender is gone, and that is `self`.
        drop(turns.wait_for(|all| is_sent_to(all, number) == may).await);
    }

    /// A call there succeeded, so it is in turn whatever was thought of it.
    pub(crate) fn worked(&self, number: usize) {
        self.turns.send_if_modified(|all| {
            all[number].worked = true;
            !std::mem::replace(&mut all[number].in_turn, true)
        });
    }

    /// A call there ended like this. True if the address is out of turn because of it.
    pub(crate) fn failed(&self, number: usize, failure: &Status) -> bool {
        let away = matches!(
            failure.code(),
            Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Unknown
                | Code::Cancelled
                | Code::Internal
        );
        if away {
            self.turns
                .send_if_modified(|all| std::mem::replace(&mut all[number].in_turn, false));
        }
        away
    }
}

fn is_sent_to(turns: &[Turn], number: usize) -> bool {
    turns[number].in_turn || turns.iter().all(|turn| !turn.in_turn)
}

fn channel(url: &str) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|source| ConnectError::Url {
        url: url.to_owned(),
        source,
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

/// Asks an address that is out of turn whether it is serving, until it is. One that says so
/// and fails all the same is asked less and less often.
async fn bring_back(turns: watch::Sender<Vec<Turn>>, number: usize, channel: Channel) {
    let mut health = HealthClient::new(channel);
    let mut changes = turns.subscribe();
    let mut pace = Pace::new(Uuid::now_v7());
    loop {
        // Fails only if the sender is gone, and that is here.
        drop(changes.wait_for(|all| !all[number].in_turn).await);
        turns.send_if_modified(|all| {
            if std::mem::replace(&mut all[number].worked, false) {
                pace = Pace::new(Uuid::now_v7());
            }
            false
        });
        loop {
            sleep(pace.next()).await;
            if is_serving(&mut health).await {
                break;
            }
        }
        turns.send_if_modified(|all| !std::mem::replace(&mut all[number].in_turn, true));
    }
}

/// A server that does not know the question is there, too.
async fn is_serving(health: &mut HealthClient<Channel>) -> bool {
    let request = HealthCheckRequest::default();
    match timeout(HEALTH_TIMEOUT, health.check(request)).await {
        Ok(Ok(reply)) => reply.into_inner().status() == ServingStatus::Serving,
        Ok(Err(status)) => status.code() == Code::Unimplemented,
        Err(_) => false,
    }
}
