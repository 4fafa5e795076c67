//! A call to a service that has nothing to do: what gRPC and a process of its own take at least.

use std::time::Duration;

use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{NewMessage, PrepareRequest};
use tokio::time::{Instant, sleep};
use tokio_util::bytes::Bytes;
use tonic::Code;
use tonic::transport::Channel;
use uuid::Uuid;

use crate::Failure;
use crate::place::Place;
use crate::service::Service;
use crate::topology::PRODUCER;

/// A topic that it does not know.
const NO_TOPIC: &str = "nothing";
/// It has to serve after this.
const START: Duration = Duration::from_secs(30);
/// How often that is tried.
const TRY: Duration = Duration::from_millis(50);

/// A service that is called and does nothing. Dropped, it is killed.
pub(crate) struct Front {
    client: MessagesClient<Channel>,
    service: Service,
}

impl Front {
    /// Starts a service on the servers of a place that nothing else uses.
    pub(crate) async fn start(place: &Place, subscriptions: &[String]) -> Result<Self, Failure> {
        let service = Service::on_servers(place, subscriptions).await?;
        let until = Instant::now() + START;
        let client = loop {
            match MessagesClient::connect(service.url.clone()).await {
                Ok(client) => break client,
                Err(_) if Instant::now() < until => sleep(TRY).await,
                Err(error) => return Err(Failure::of("connect to the service")(error)),
            }
        };
        Ok(Self { client, service })
    }

    /// What calls it.
    pub(crate) fn caller(&self) -> Caller {
        Caller(self.client.clone())
    }

    pub(crate) async fn stop(self) -> Result<(), Failure> {
        self.service.kill().await
    }
}

/// Calls that service.
#[derive(Clone)]
pub(crate) struct Caller(MessagesClient<Channel>);

impl Caller {
    /// One call there and back. The service reads the message and refuses it from memory, because
    /// it does not know the topic.
    pub(crate) async fn call(&mut self, payload: Bytes) -> Result<(), Failure> {
        let message = NewMessage {
            id: Uuid::now_v7().as_bytes().to_vec(),
            topic: NO_TOPIC.to_owned(),
            payload,
            ..NewMessage::default()
        };
        let request = PrepareRequest {
            producer: PRODUCER.to_owned(),
            messages: vec![message],
        };
        let answered = self.0.prepare(request).await;
        let answered = answered.map_err(Failure::of("call the service"))?;
        match answered.into_inner().results.as_slice() {
            [one] => match &one.outcome {
                Some(Outcome::Error(status)) if status.code == Code::NotFound as i32 => Ok(()),
                other => Err(Failure(format!("a call was not refused: {other:?}"))),
            },
            all => Err(Failure(format!("one call had {} answers", all.len()))),
        }
    }
}
