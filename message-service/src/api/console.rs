//! What operators call.

use std::sync::Arc;

use handfast_proto::v1 as proto;
use handfast_proto::v1::console_server::Console;
use tonic::{Request, Response, Status};

use super::convert::{self, console};
use super::status;
use crate::service::{Error, Service};

/// The service `handfast.v1.Console`.
#[derive(Debug)]
pub(super) struct Api {
    service: Arc<Service>,
}

impl Api {
    pub(super) fn new(service: Arc<Service>) -> Self {
        Self { service }
    }

    async fn show(
        &self,
        request: proto::ShowMessageRequest,
    ) -> Result<proto::ShowMessageResponse, Error> {
        let id = convert::message_id("message_id", &request.message_id)?;
        let shown = self.service.show(id, request.with_body).await?;
        Ok(console::shown(shown))
    }

    async fn messages(
        &self,
        request: proto::ListMessagesRequest,
    ) -> Result<proto::ListMessagesResponse, Error> {
        let filter = console::message_filter(request.state, &request.flag)?;
        let after = console::message_cursor(&request.cursor)?;
        let page = self
            .service
            .list_messages(filter, after, request.page_size)
            .await?;
        Ok(proto::ListMessagesResponse {
            messages: page.rows.into_iter().map(console::message_row).collect(),
            next_cursor: page.next.map_or_else(Vec::new, |id| id.as_bytes().to_vec()),
        })
    }

    async fn deliveries(
        &self,
        request: proto::ListDeliveriesRequest,
    ) -> Result<proto::ListDeliveriesResponse, Error> {
        let state = console::delivery_filter(request.state)?;
        let after = console::delivery_cursor(&request.cursor)?;
        let subscription = Some(request.subscription).filter(|name| !name.is_empty());
        let page = self
            .service
            .list_deliveries(state, subscription, after, request.page_size)
            .await?;
        let next = page.next.as_ref();
        Ok(proto::ListDeliveriesResponse {
            next_cursor: next.map_or_else(Vec::new, console::write_delivery_cursor),
            deliveries: page.rows.into_iter().map(console::delivery_row).collect(),
        })
    }
}

#[tonic::async_trait]
impl Console for Api {
    async fn counts(
        &self,
        _request: Request<proto::CountsRequest>,
    ) -> Result<Response<proto::CountsResponse>, Status> {
        let counts = self.service.counts().await;
        let counts = counts.map_err(|error| status::of_call(&error))?;
        Ok(Response::new(console::counts(counts)))
    }

    async fn replicas(
        &self,
        _request: Request<proto::ReplicasRequest>,
    ) -> Result<Response<proto::ReplicasResponse>, Status> {
        let replicas = self.service.replicas().await;
        let replicas = replicas.map_err(|error| status::of_call(&error))?;
        Ok(Response::new(proto::ReplicasResponse {
            replicas: replicas.into_iter().map(console::replica).collect(),
        }))
    }

    async fn show_message(
        &self,
        request: Request<proto::ShowMessageRequest>,
    ) -> Result<Response<proto::ShowMessageResponse>, Status> {
        let shown = self.show(request.into_inner()).await;
        shown
            .map(Response::new)
            .map_err(|error| status::of_call(&error))
    }

    async fn list_messages(
        &self,
        request: Request<proto::ListMessagesRequest>,
    ) -> Result<Response<proto::ListMessagesResponse>, Status> {
        let page = self.messages(request.into_inner()).await;
        page.map(Response::new)
            .map_err(|error| status::of_call(&error))
    }

    async fn list_deliveries(
        &self,
        request: Request<proto::ListDeliveriesRequest>,
    ) -> Result<Response<proto::ListDeliveriesResponse>, Status> {
        let page = self.deliveries(request.into_inner()).await;
        page.map(Response::new)
            .map_err(|error| status::of_call(&error))
    }
}
