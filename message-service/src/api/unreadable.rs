//! Calls that could not be decoded: text that is not UTF-8, bytes that are no message of the
//! contract, and what is over the decoding limit.
//!
//! tonic refuses them before a handler runs, so nothing of them is stored. But it says
//! INTERNAL or OUT_OF_RANGE, which reads like a fault of the service; to a caller they are
//! arguments like any other malformed one, and repeating them is as useless.

use std::convert::Infallible;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;
use tonic::{Code, Status};

use super::status;
use crate::service::{Error, Invalid};

/// How the two refusals of tonic 0.14 begin. A test over the wire notices if they change.
const NOT_DECODED: &str = "failed to decode Protobuf message";
const TOO_LARGE: &str = "Error, decoded message length too large";

/// The status of a call that could not be decoded; any other status as it was.
pub(super) fn refused(status: Status) -> Status {
    let unreadable = match status.code() {
        Code::Internal => status.message().starts_with(NOT_DECODED),
        Code::OutOfRange => status.message().starts_with(TOO_LARGE),
        _ => false,
    };
    if unreadable {
        let invalid = Invalid::new("request", status.message());
        status::of_call(&Error::from(invalid))
    } else {
        status
    }
}

/// A service whose undecodable calls are refused as malformed.
#[derive(Clone, Debug)]
pub(super) struct Readable<S> {
    inner: S,
}

impl<S> Readable<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S: NamedService> NamedService for Readable<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Readable<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            // tonic leaves the status of a refusal beside the headers it made of it.
            let refusal = response.extensions().get::<Status>().cloned();
            Ok(match refusal {
                Some(status) => refused(status).into_http(),
                None => response,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_the_service_stays_one() {
        let status = refused(Status::internal("the service met a fault of its own"));
        assert_eq!(status.code(), Code::Internal);
        let status = refused(Status::out_of_range("elsewhere"));
        assert_eq!(status.code(), Code::OutOfRange);
    }
}
