//! The source that is the service itself (embedded broker): `Deliveries` over gRPC.
//!
//! Two tasks share one connection. [`receive`] keeps a stream open and turns recorded answers
//! into credit; [`record`] turns answers into calls. They are apart because an answer must
//! reach the service also when its stream is gone.

mod receive;
mod record;

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::v1::deliveries_client::DeliveriesClient;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Channel, Endpoint};

use super::{Link, Order, Recorded};
use crate::error::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A service that is dead without having closed its connection is noticed after these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// For one call, and for the opening of a stream.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest message of the stream that is read. A delivery is at most 1 MiB of payload
/// with its headers; how many share a message is the service's choice.
const MAX_STREAM_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

pub(crate) struct Service {
    address: String,
    client: DeliveriesClient<Channel>,
}

impl Service {
    pub(crate) fn new(address: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Address {
            address: address.to_owned(),
            reason,
        };
        let endpoint =
            Endpoint::from_shared(address.to_owned()).map_err(|error| wrong(error.to_string()))?;
        if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
            return Err(wrong("it must be like http://127.0.0.1:7400".to_owned()));
        }
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_lazy();
        Ok(Self {
            address: address.to_owned(),
            client: DeliveriesClient::new(channel)
                .max_decoding_message_size(MAX_STREAM_MESSAGE_BYTES),
        })
    }

    pub(crate) fn open(self, order: Order) -> Link {
        let prefetch = order.prefetch as usize;
        // Neither is ever full: there are no more deliveries, and so no more answers, than
        // the prefetch allows.
        let (deliveries_in, deliveries) = mpsc::channel(prefetch);
        let (answers, answers_out) = mpsc::channel(prefetch);
        // Not bounded by itself: it carries counts of answers, which are.
        let (recorded_in, recorded) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let done = Arc::new(Recorded::default());
        let receiver = receive::Receive {
            address: self.address.clone(),
            client: self.client.clone(),
            order: order.clone(),
            deliveries: deliveries_in,
            recorded,
            stop: stop.clone(),
            held: 0,
            done: Arc::clone(&done),
        };
        let recorder = record::Record {
            address: self.address,
            client: self.client,
            subscription: order.subscription,
            answers: answers_out,
            recorded: recorded_in,
            done: Arc::clone(&done),
        };
        Link {
            deliveries,
            answers,
            stop,
            recorded: done,
            recorder: AbortOnDropHandle::new(tokio::spawn(recorder.run())),
            receiver: AbortOnDropHandle::new(tokio::spawn(receiver.run())),
        }
    }
}
