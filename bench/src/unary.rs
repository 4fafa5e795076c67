//! Prepare and confirm as single unary calls, as a program without the SDK makes them, beside the
//! bare pipeline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{ConfirmRequest, ItemResult, NewMessage, PrepareRequest};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::bytes::Bytes;
use uuid::Uuid;

use crate::Failure;
use crate::options::Options;
use crate::pipeline::{measured, run_bare};
use crate::servers::Servers;
use crate::sides::alternate;
use crate::topology::{self, PRODUCER, TOPIC};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- unary --callers 64 --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages of one round; on a machine of two processors the default takes about 20 s
    #[arg(long, value_name = "N", default_value_t = 150_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Callers, each with one call in flight
    #[arg(long, value_name = "N", default_value_t = 64,
        value_parser = clap::value_parser!(u64).range(1..=10_000))]
    callers: u64,
}

/// Measures both in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    let payload = options.payload as usize;
    let names = topology::subscriptions(1);
    let (messages, callers) = (args.messages, args.callers);
    let sides = alternate(options, &["bare", "unary"], async |side| match side {
        0 => run_bare(&servers, &names, messages, payload).await,
        _ => {
            measured(&servers, &names, messages, async |running| {
                call(&running.service.url, messages, payload, callers).await
            })
            .await
        }
    });
    let sides = sides.await?;
    sides.print();
    if options.json {
        let others = json!({
            "messages": messages,
            "payload_bytes": options.payload,
            "callers": callers,
            "about": about,
        });
        println!("{}", sides.json("unary", others));
    }
    Ok(())
}

/// Each call carries one message.
async fn call(url: &str, messages: u64, payload: usize, callers: u64) -> Result<(), Failure> {
    let client = MessagesClient::connect(url.to_owned()).await;
    let client = client.map_err(Failure::of("connect to the service"))?;
    let payload = Bytes::from(topology::payload(payload));
    let next = Arc::new(AtomicU64::new(0));
    let mut all = JoinSet::new();
    for _ in 0..callers.min(messages) {
        let (mut client, next, payload) = (client.clone(), next.clone(), payload.clone());
        all.spawn(async move {
            while next.fetch_add(1, Ordering::Relaxed) < messages {
                let id = Uuid::now_v7().as_bytes().to_vec();
                let message = NewMessage {
                    id: id.clone(),
                    topic: TOPIC.to_owned(),
                    payload: payload.clone(),
                    ..NewMessage::default()
                };
                let prepare = PrepareRequest {
                    producer: PRODUCER.to_owned(),
                    messages: vec![message],
                };
                let done = client.prepare(prepare).await;
                went_well(done.map_err(Failure::of("prepare"))?.into_inner().results)?;
                let confirm = ConfirmRequest {
                    producer: PRODUCER.to_owned(),
                    message_ids: vec![id],
                };
                let done = client.confirm(confirm).await;
                went_well(done.map_err(Failure::of("confirm"))?.into_inner().results)?;
            }
            Ok::<(), Failure>(())
        });
    }
    while let Some(done) = all.join_next().await {
        done.map_err(Failure::of("call"))??;
    }
    Ok(())
}

fn went_well(results: Vec<ItemResult>) -> Result<(), Failure> {
    let is_state = |result: &ItemResult| matches!(result.outcome, Some(Outcome::State(_)));
    match results.len() == 1 && results.iter().all(is_state) {
        true => Ok(()),
        false => Err(Failure(format!("a message was refused: {results:?}"))),
    }
}
