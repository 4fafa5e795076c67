//! Keeps a stream of deliveries open and gives credit for what is answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use handfast_proto::v1;
use handfast_proto::v1::consume_request::{Kind, Open};
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use uuid::Uuid;

use super::CALL_TIMEOUT;
use crate::backoff::Backoff;
use crate::message::Delivered;
use crate::source::reachable::Reachable;
use crate::source::{Order, Recorded};

/// How long the service gets to end a stream on which nothing is open. Deliveries that were
/// on their way meanwhile still arrive.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// A stream that lived this long was a good one: the next trouble is a new trouble.
const GOOD: Duration = Duration::from_secs(1);
/// How many grants may wait in the stream; more are added up.
const GRANTS: usize = 4;

pub(super) struct Receive {
    pub(super) address: String,
    pub(super) client: DeliveriesClient<Channel>,
    pub(super) order: Order,
    pub(super) deliveries: mpsc::Sender<Delivered>,
    /// How many answers were recorded, since the last time.
    pub(super) recorded: mpsc::UnboundedReceiver<u32>,
    pub(super) stop: CancellationToken,
    /// Deliveries, of this stream and of earlier ones, whose answer is not recorded.
    pub(super) held: u32,
    pub(super) done: Arc<Recorded>,
}

struct Opened {
    requests: mpsc::Sender<v1::ConsumeRequest>,
    stream: Streaming<v1::ConsumeResponse>,
}

impl Receive {
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let mut backoff = Backoff::new();
        let mut reachable = Reachable::new("receive deliveries");
        while !stop.is_cancelled() {
            let opened = tokio::select! {
                // A stream that has opened may carry deliveries already.
                biased;
                opened = self.open() => opened,
                () = stop.cancelled() => break,
            };
            let trouble = match opened {
                Ok(opened) => {
                    reachable.yes(&self.address);
                    let since = Instant::now();
                    let end = self.pump(opened).await;
                    if since.elapsed() >= GOOD {
                        backoff.reset();
                    }
                    end
                }
                Err(status) => Some(status),
            };
            if let Some(status) = trouble {
                reachable.no(&self.address, status.code(), status.message());
                tokio::select! {
                    () = sleep(backoff.next()) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
        // What is in work is still answered, by calls, and the link lasts until it is.
        while self.held > 0 {
            match self.recorded.recv().await {
                Some(count) => self.held -= count.min(self.held),
                None => return,
            }
        }
    }

    async fn open(&mut self) -> Result<Opened, Status> {
        while let Ok(count) = self.recorded.try_recv() {
            self.held -= count.min(self.held);
        }
        let (requests, requests_out) = mpsc::channel(GRANTS);
        let open = Kind::Open(Open {
            topic: self.order.topic.clone(),
            subscription: self.order.subscription.clone(),
            consumer: self.order.consumer.clone(),
        });
        // What an earlier stream delivered and is still in work takes part of the credit.
        let credit = Kind::Credit(self.order.prefetch.saturating_sub(self.held));
        for kind in [open, credit] {
            if kind != Kind::Credit(0) {
                // There is room for both, and the other end is in this function.
                let _ = requests.try_send(v1::ConsumeRequest { kind: Some(kind) });
            }
        }
        let call = self.client.consume(ReceiverStream::new(requests_out));
        let response = timeout(CALL_TIMEOUT, call)
            .await
            .map_err(|_| Status::deadline_exceeded("the stream did not open in time"))??;
        Ok(Opened {
            requests,
            stream: response.into_inner(),
        })
    }

    /// Receives until the stream ends, or until everything is answered after `stop`. The
    /// status says why the stream was lost.
    async fn pump(&mut self, opened: Opened) -> Option<Status> {
        let mut stream = opened.stream;
        // Dropping it closes the request side, which ends the credit but not the stream.
        let mut requests = Some(opened.requests);
        let mut owed = 0;
        let mut last_words = None;
        loop {
            if self.stop.is_cancelled() {
                requests = None;
            }
            if requests.is_none() && self.held == 0 {
                last_words.get_or_insert_with(|| Instant::now() + LAST_WORDS);
            } else {
                last_words = None;
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if requests.is_some() => {}
                received = stream.message() => match received {
                    Ok(Some(response)) => owed += self.pass_on(response).await,
                    Ok(None) => return Some(Status::unavailable("the service ended the stream")),
                    Err(status) => return Some(status),
                },
                Some(count) = self.recorded.recv() => {
                    self.held -= count.min(self.held);
                    owed += count;
                }
                Some(permit) = grant(requests.as_ref()), if owed > 0 => {
                    permit.send(v1::ConsumeRequest { kind: Some(Kind::Credit(owed)) });
                    owed = 0;
                }
                () = until(last_words) => return None,
            }
        }
    }

    /// Hands deliveries on. Returns the credit of those that cannot be read.
    async fn pass_on(&mut self, response: v1::ConsumeResponse) -> u32 {
        let mut unreadable = 0;
        for delivery in response.deliveries {
            match Delivered::try_from(delivery) {
                Ok(message) => {
                    self.held += 1;
                    // It fails only if the consumer is gone, which ends this task too.
                    let _ = self.deliveries.send(message).await;
                }
                Err(reason) => {
                    unreadable += 1;
                    self.done.unreadable.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(reason, "dropped a delivery that cannot be read");
                }
            }
        }
        unreadable
    }
}

impl TryFrom<v1::Delivery> for Delivered {
    type Error = String;

    fn try_from(delivery: v1::Delivery) -> Result<Self, String> {
        let message_id = Uuid::from_slice(&delivery.message_id)
            .map_err(|error| format!("the message id is not a UUID: {error}"))?;
        Ok(Self {
            message_id,
            subscription: delivery.subscription,
            topic: delivery.topic,
            producer: delivery.producer,
            key: delivery.key,
            content_type: delivery.content_type,
            headers: delivery
                .headers
                .into_iter()
                .map(|header| (header.name, header.value))
                .collect(),
            payload: delivery.payload,
            generation: delivery.generation,
            sent_at: delivery.sent_at,
            first_sent_at: delivery.first_sent_at,
            alone: delivery.alone,
        })
    }
}

/// Room for one grant; never, once the request side is closed.
async fn grant(
    requests: Option<&mpsc::Sender<v1::ConsumeRequest>>,
) -> Option<mpsc::Permit<'_, v1::ConsumeRequest>> {
    // An error means that the stream is over, which the stream itself says next.
    requests?.reserve().await.ok()
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
