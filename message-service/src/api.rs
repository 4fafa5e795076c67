//! The gRPC side: parse at the edge, ask [`crate::service`], convert back.
//!
//! Handlers are a dozen lines. What is malformed is found in [`convert`], what an error looks
//! like on the wire is said in [`status`], and nothing here touches the store.

mod console;
mod convert;
mod deliveries;
mod messages;
mod status;
mod unreadable;

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::v1::console_server::ConsoleServer;
use handfast_proto::v1::deliveries_server::DeliveriesServer;
use handfast_proto::v1::messages_server::MessagesServer;
use handfast_proto::{FILE_DESCRIPTOR_SET, MAX_CALL_BYTES};
use tonic::service::Routes;
use tonic::transport::Server;

use crate::service::{Service, embedded::Embedded};
use unreadable::Readable;

/// The largest reply: a page of the console, or a batch of deliveries with one body at the
/// hard limit behind the last one that fitted.
const MAX_REPLY_BYTES: usize = 8 * 1024 * 1024;
/// Calls that one connection may have open at a time.
const CONCURRENT_STREAMS: u32 = 200;
/// Streams of one connection that the server had to reset before it is closed. tonic switches
/// this bound off unless it is set, and then resets cost the attacker nothing.
const LOCAL_ERROR_RESETS: usize = 1024;
/// A connection that is silent for this long is asked, and closed if it does not answer.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Names and values of one call's metadata together.
const HEADER_LIST_BYTES: u32 = 16 * 1024;
/// What one call may send before the server takes it: half of the largest call.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// What one connection may send before the server takes it.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// What the API shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Also answer what services there are. For loopback, or when asked for.
    pub reflection: bool,
}

/// The services of `handfast.v1`, to be added to a [`server_builder`]. Without the embedded
/// broker, `Consume` says where deliveries are instead.
pub fn router(
    service: Arc<Service>,
    embedded: Option<Arc<Embedded>>,
    options: Options,
) -> Result<Routes, tonic_reflection::server::Error> {
    let messages = MessagesServer::new(messages::Api::new(Arc::clone(&service)))
        .max_decoding_message_size(MAX_CALL_BYTES)
        .max_encoding_message_size(MAX_REPLY_BYTES);
    let console = ConsoleServer::new(console::Api::new(Arc::clone(&service)))
        .max_decoding_message_size(MAX_CALL_BYTES)
        .max_encoding_message_size(MAX_REPLY_BYTES);
    let deliveries = DeliveriesServer::new(deliveries::Api::new(service, embedded))
        .max_decoding_message_size(MAX_CALL_BYTES)
        .max_encoding_message_size(MAX_REPLY_BYTES);
    let mut routes = Routes::new(Readable::new(messages))
        .add_service(Readable::new(deliveries))
        .add_service(Readable::new(console));
    if options.reflection {
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .build_v1()?;
        routes = routes.add_service(reflection);
    }
    Ok(routes)
}

/// A server whose HTTP/2 limits are set by hand. Add services to it, not layers: in this
/// version of tonic `layer` forgets the bound on local resets.
pub fn server_builder() -> Server {
    Server::builder()
        .max_concurrent_streams(CONCURRENT_STREAMS)
        .concurrency_limit_per_connection(CONCURRENT_STREAMS as usize)
        .http2_max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_header_list_size(HEADER_LIST_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .tcp_nodelay(true)
}
