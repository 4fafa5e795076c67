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
    /// Which of them are in turn.
    in_turn: watch::Sender<Vec<bool>>,
    /// Ends the questions whether they are serving.
    _stop: DropGuard,
}

impl Endpoints {
    /// Reads addresses that are separated by commas. Connections are made when they are first
    /// needed, and whenever they were lost.
    pub(crate) fn read(urls: &str) -> Result<Arc<Self>, ConnectError> {
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
        let in_turn = watch::Sender::new(vec![true; channels.len()]);
        let stop = CancellationToken::new();
        if channels.len() > 1 {
            for (number, channel) in channels.iter().cloned().enumerate() {
                let (in_turn, stop) = (in_turn.clone(), stop.clone());
                tokio::spawn(async move {
                    let asking = bring_back(in_turn, number, channel);
                    stop.run_until_cancelled(asking).await
                });
            }
        }
        Ok(Arc::new(Self {
            all: channels.into_iter().map(MessagesClient::new).collect(),
            in_turn,
            _stop: stop.drop_guard(),
        }))
    }

    /// Waits until this address may be sent to, or `false` if it may not be any more.
    pub(crate) async fn until(&self, number: usize, may: bool) {
        let mut in_turn = self.in_turn.subscribe();
        // Fails only if the sender is gone, and that is `self`.
        drop(in_turn.wait_for(|all| is_sent_to(all, number) == may).await);
    }

    /// A call there ended like this.
    pub(crate) fn note(&self, number: usize, failure: &Status) {
        let away = matches!(
            failure.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled
        );
        if away {
            self.in_turn
                .send_if_modified(|all| std::mem::replace(&mut all[number], false));
        }
    }
}

fn is_sent_to(in_turn: &[bool], number: usize) -> bool {
    in_turn[number] || !in_turn.contains(&true)
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

/// Asks an address that is out of turn whether it is serving, until it is.
async fn bring_back(in_turn: watch::Sender<Vec<bool>>, number: usize, channel: Channel) {
    let mut health = HealthClient::new(channel);
    let mut changes = in_turn.subscribe();
    loop {
        // Fails only if the sender is gone, and that is here.
        drop(changes.wait_for(|all| !all[number]).await);
        let mut pace = Pace::new(Uuid::now_v7());
        loop {
            sleep(pace.next()).await;
            if is_serving(&mut health).await {
                break;
            }
        }
        in_turn.send_modify(|all| all[number] = true);
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
