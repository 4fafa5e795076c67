//! What producers call.

use std::sync::Arc;

use handfast_proto::v1 as proto;
use handfast_proto::v1::messages_server::Messages;
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::service::Service;

/// The service `handfast.v1.Messages`.
#[derive(Debug)]
pub(super) struct Api {
    service: Arc<Service>,
}

impl Api {
    pub(super) fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

/// The ids as they were sent, to stand beside their results.
fn ids(messages: &[proto::NewMessage]) -> Vec<Vec<u8>> {
    messages.iter().map(|message| message.id.clone()).collect()
}

#[tonic::async_trait]
impl Messages for Api {
    async fn prepare(
        &self,
        request: Request<proto::PrepareRequest>,
    ) -> Result<Response<proto::PrepareResponse>, Status> {
        let request = request.into_inner();
        let ids = ids(&request.messages);
        let call = convert::submission(request.producer, request.messages);
        let results = self.service.prepare(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::item_results(ids, results);
        Ok(Response::new(proto::PrepareResponse { results }))
    }

    async fn publish(
        &self,
        request: Request<proto::PublishRequest>,
    ) -> Result<Response<proto::PublishResponse>, Status> {
        let request = request.into_inner();
        let ids = ids(&request.messages);
        let call = convert::submission(request.producer, request.messages);
        let results = self.service.publish(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::item_results(ids, results);
        Ok(Response::new(proto::PublishResponse { results }))
    }

    async fn confirm(
        &self,
        request: Request<proto::ConfirmRequest>,
    ) -> Result<Response<proto::ConfirmResponse>, Status> {
        let request = request.into_inner();
        let call = convert::ids(request.producer, &request.message_ids);
        let results = self.service.confirm(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::item_results(request.message_ids, results);
        Ok(Response::new(proto::ConfirmResponse { results }))
    }

    async fn cancel(
        &self,
        request: Request<proto::CancelRequest>,
    ) -> Result<Response<proto::CancelResponse>, Status> {
        let request = request.into_inner();
        let call = convert::ids(request.producer, &request.message_ids);
        let results = self.service.cancel(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::item_results(request.message_ids, results);
        Ok(Response::new(proto::CancelResponse { results }))
    }

    async fn get(
        &self,
        request: Request<proto::GetRequest>,
    ) -> Result<Response<proto::GetResponse>, Status> {
        let request = request.into_inner();
        let call = convert::ids(request.producer, &request.message_ids);
        let results = self.service.get(call).await;
        let results = results.map_err(|error| status::of_call(&error))?;
        let results = convert::get_results(request.message_ids, results);
        Ok(Response::new(proto::GetResponse { results }))
    }
}
