//! The producer's verbs, each as one call that carries many items.

use std::future::Future;

use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{self, get_result, item_result};
use prost::Message as _;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::error::Refusal;

/// What became of one item.
pub(crate) type ItemOutcome<R> = Result<R, Box<Refusal>>;

/// The items of a reply, in its order: the id, and what became of it.
pub(crate) type Answered<R> = Vec<(WireId, ItemOutcome<R>)>;

/// One method of the service `Messages`.
pub(crate) trait Verb: Send + Sync + 'static {
    /// What one caller brings.
    type Item: Clone + Send + Sync + 'static;
    /// What one caller gets.
    type Reply: Send + 'static;
    /// For messages: `cannot <name> message …`.
    const NAME: &'static str;

    /// How much of a call's size the item takes.
    fn bytes(item: &Self::Item) -> usize;
    /// The id of the item, as it comes back in the reply.
    fn id(item: &Self::Item) -> &[u8];
    /// Sends the items, and returns what was said about each, in the reply's order.
    fn call(
        client: MessagesClient<Channel>,
        producer: String,
        items: Vec<Self::Item>,
    ) -> impl Future<Output = Result<Answered<Self::Reply>, Status>> + Send;
}

/// An id, as the contract carries it.
pub(crate) type WireId = Vec<u8>;

type State = v1::MessageState;

#[derive(Debug)]
pub(crate) enum Prepare {}
#[derive(Debug)]
pub(crate) enum Publish {}
#[derive(Debug)]
pub(crate) enum Confirm {}
#[derive(Debug)]
pub(crate) enum Cancel {}
#[derive(Debug)]
pub(crate) enum Get {}

macro_rules! messages {
    ($verb:ident, $name:literal, $method:ident, $request:ident) => {
        impl Verb for $verb {
            type Item = v1::NewMessage;
            type Reply = State;
            const NAME: &'static str = $name;

            fn bytes(item: &Self::Item) -> usize {
                item.encoded_len()
            }

            fn id(item: &Self::Item) -> &[u8] {
                &item.id
            }

            async fn call(
                mut client: MessagesClient<Channel>,
                producer: String,
                messages: Vec<Self::Item>,
            ) -> Result<Answered<State>, Status> {
                let request = v1::$request { producer, messages };
                let reply = client.$method(Request::new(request)).await?;
                Ok(states(reply.into_inner().results))
            }
        }
    };
}

macro_rules! decisions {
    ($verb:ident, $name:literal, $method:ident, $request:ident) => {
        impl Verb for $verb {
            type Item = WireId;
            type Reply = State;
            const NAME: &'static str = $name;

            fn bytes(item: &Self::Item) -> usize {
                item.len()
            }

            fn id(item: &Self::Item) -> &[u8] {
                item
            }

            async fn call(
                mut client: MessagesClient<Channel>,
                producer: String,
                message_ids: Vec<Self::Item>,
            ) -> Result<Answered<State>, Status> {
                let request = v1::$request {
                    producer,
                    message_ids,
                };
                let reply = client.$method(Request::new(request)).await?;
                Ok(states(reply.into_inner().results))
            }
        }
    };
}

messages!(Prepare, "prepare", prepare, PrepareRequest);
messages!(Publish, "publish", publish, PublishRequest);
decisions!(Confirm, "confirm", confirm, ConfirmRequest);
decisions!(Cancel, "cancel", cancel, CancelRequest);

impl Verb for Get {
    type Item = WireId;
    type Reply = v1::MessageStatus;
    const NAME: &'static str = "get";

    fn bytes(item: &Self::Item) -> usize {
        item.len()
    }

    fn id(item: &Self::Item) -> &[u8] {
        item
    }

    async fn call(
        mut client: MessagesClient<Channel>,
        producer: String,
        message_ids: Vec<Self::Item>,
    ) -> Result<Answered<v1::MessageStatus>, Status> {
        let request = v1::GetRequest {
            producer,
            message_ids,
        };
        let reply = client.get(Request::new(request)).await?;
        let results = reply.into_inner().results.into_iter().map(|result| {
            let outcome = match result.outcome {
                Some(get_result::Outcome::Status(status)) => Ok(status),
                Some(get_result::Outcome::Error(status)) => {
                    Err(Box::new(Refusal::from_item(&status)))
                }
                None => Err(Box::new(Refusal::of_reply("the reply has no outcome"))),
            };
            (result.message_id, outcome)
        });
        Ok(results.collect())
    }
}

fn states(results: Vec<v1::ItemResult>) -> Answered<State> {
    results
        .into_iter()
        .map(|result| {
            let outcome = match result.outcome {
                Some(item_result::Outcome::State(state)) => {
                    Ok(State::try_from(state).unwrap_or(State::Unspecified))
                }
                Some(item_result::Outcome::Error(status)) => {
                    Err(Box::new(Refusal::from_item(&status)))
                }
                None => Err(Box::new(Refusal::of_reply("the reply has no outcome"))),
            };
            (result.message_id, outcome)
        })
        .collect()
}
