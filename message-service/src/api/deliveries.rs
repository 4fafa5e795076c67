//! What consumers call.
//!
//! The engine behind `Consume` is the embedded broker's; here its session is joined to the
//! two halves of a gRPC stream.

use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use handfast_proto::v1 as proto;
use handfast_proto::v1::consume_request::{Kind, Open};
use handfast_proto::v1::deliveries_server::Deliveries;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{convert, status, unreadable};
use crate::service::embedded::{Embedded, Session};
use crate::service::{Error, Invalid, Service};

/// A stream has to open within this time; one that stays silent holds a place for nothing.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

type Sent = Result<proto::ConsumeResponse, Status>;

/// The service `handfast.v1.Deliveries`.
#[derive(Debug)]
pub(super) struct Api {
    service: Arc<Service>,
    embedded: Option<Arc<Embedded>>,
}

impl Api {
    pub(super) fn new(service: Arc<Service>, embedded: Option<Arc<Embedded>>) -> Self {
        Self { service, embedded }
    }

    /// Opens a session for what the first request asks for.
    fn open(&self, embedded: &Arc<Embedded>, open: Open) -> Result<Session, Error> {
        self.service
            .check_stream(&open.topic, &open.subscription, &open.consumer)?;
        let session = embedded.open(open.subscription, open.consumer);
        session.map_err(|_too_many| Error::Overloaded { what: "streams" })
    }
}

#[tonic::async_trait]
impl Deliveries for Api {
    type ConsumeStream = std::pin::Pin<Box<dyn Stream<Item = Sent> + Send>>;

    async fn consume(
        &self,
        request: Request<Streaming<proto::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let Some(embedded) = &self.embedded else {
            return Err(Status::failed_precondition(
                "this service delivers over RabbitMQ; consume the subscription's queue there",
            ));
        };
        let mut requests = request.into_inner();
        let open = first(&mut requests).await?;
        let subscription = open.subscription.clone();
        let opened = self.open(embedded, open);
        let session = opened.map_err(|error| status::of_call(&error))?;
        // One place: what the client has not taken yet must not pile up here.
        let (replies, stream) = mpsc::channel(1);
        tokio::spawn(carry(session, subscription, requests, replies));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn acknowledge(
        &self,
        request: Request<proto::AcknowledgeRequest>,
    ) -> Result<Response<proto::AcknowledgeResponse>, Status> {
        let request = request.into_inner();
        let ids = request.answers.iter();
        let ids = ids.map(|answer| answer.message_id.clone()).collect();
        let call = convert::answers(request.subscription, request.answers);
        let results = self.service.acknowledge(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::answer_results(ids, results);
        Ok(Response::new(proto::AcknowledgeResponse { results }))
    }
}

/// The first request, which has to open.
async fn first(requests: &mut Streaming<proto::ConsumeRequest>) -> Result<Open, Status> {
    let first = tokio::time::timeout(OPEN_WITHIN, requests.message()).await;
    let Ok(first) = first else {
        return Err(malformed("open", "did not come within 10 s"));
    };
    match first
        .map_err(unreadable::refused)?
        .and_then(|first| first.kind)
    {
        Some(Kind::Open(open)) => Ok(open),
        Some(Kind::Credit(_)) | None => Err(malformed("open", "must be the first request")),
    }
}

/// Carries credit in and deliveries out until one side ends.
async fn carry(
    mut session: Session,
    subscription: String,
    mut requests: Streaming<proto::ConsumeRequest>,
    replies: mpsc::Sender<Sent>,
) {
    let mut granting = true;
    loop {
        tokio::select! {
            () = replies.closed() => return session.lost(),
            request = requests.message(), if granting => match credit(request) {
                Ok(Some(credit)) => session.credit(credit),
                Ok(None) => {
                    granting = false;
                    session.half_close();
                }
                Err(refused) => {
                    // If the place is taken, the client learns only that the stream ended.
                    let _ = replies.try_send(Err(refused));
                    return session.lost();
                }
            },
            sent = next(&mut session, &subscription, &replies) => if !sent {
                return;
            },
        }
    }
}

/// Sends what is due next, once there is room for it. False when the session is over.
async fn next(session: &mut Session, subscription: &str, replies: &mpsc::Sender<Sent>) -> bool {
    let Ok(place) = replies.reserve().await else {
        return std::future::pending().await;
    };
    let Some(batch) = session.next().await else {
        return false;
    };
    let delivery = |sending| convert::delivery(subscription, sending);
    let deliveries = batch.into_iter().map(delivery).collect();
    place.send(Ok(proto::ConsumeResponse { deliveries }));
    true
}

/// How much credit a request grants; `None` if no more will come.
fn credit(request: Result<Option<proto::ConsumeRequest>, Status>) -> Result<Option<u32>, Status> {
    let Some(request) = request.map_err(unreadable::refused)? else {
        return Ok(None);
    };
    match request.kind {
        Some(Kind::Credit(0)) => Err(malformed("credit", "is 0")),
        Some(Kind::Credit(credit)) => Ok(Some(credit)),
        Some(Kind::Open(_)) => Err(malformed("open", "is only the first request")),
        None => Err(malformed("kind", "is missing")),
    }
}

fn malformed(field: &str, reason: &str) -> Status {
    status::of_call(&Error::from(Invalid::new(field, reason)))
}
