//! Group commit on the client's side: while one call of a verb is in flight, further items
//! of that verb collect, and the next call carries them all.
//!
//! No timer takes part: a lone item goes out at once. Each caller gets its own item's result.

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::MAX_ITEMS;
use handfast_proto::v1::messages_client::MessagesClient;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::error::Refusal;
use crate::verbs::{Answered, ItemOutcome, Verb};

/// A call is cut here, except that it always takes one item.
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// Items of one verb that wait for their call.
const MAX_QUEUED_ITEMS: usize = 2 * MAX_ITEMS;
/// Bytes of one verb that wait or are in flight.
const MAX_QUEUED_BYTES: u32 = 8 * 1024 * 1024;
/// After this a call is given up and its items may be sent again.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// The queue of one verb. A full one makes callers wait.
#[derive(Debug)]
pub(crate) struct Lane<V: Verb> {
    queue: mpsc::Sender<Waiting<V>>,
    bytes: Arc<Semaphore>,
}

struct Waiting<V: Verb> {
    item: V::Item,
    reply: oneshot::Sender<ItemOutcome<V::Reply>>,
    _bytes: OwnedSemaphorePermit,
}

impl<V: Verb> Lane<V> {
    /// Starts the task that sends; it ends when the lane is dropped.
    pub(crate) fn start(client: MessagesClient<Channel>, producer: String) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_QUEUED_ITEMS);
        tokio::spawn(send_all::<V>(client, producer, waiting));
        Self {
            queue,
            bytes: Arc::new(Semaphore::new(MAX_QUEUED_BYTES as usize)),
        }
    }

    /// Sends one item together with whatever else is waiting, once.
    pub(crate) async fn send(&self, item: V::Item) -> ItemOutcome<V::Reply> {
        let bytes = u32::try_from(V::bytes(&item)).unwrap_or(MAX_QUEUED_BYTES);
        let permits = Arc::clone(&self.bytes).acquire_many_owned(bytes.clamp(1, MAX_QUEUED_BYTES));
        let Ok(permit) = permits.await else {
            return Err(stopped());
        };
        let (reply, answered) = oneshot::channel();
        let waiting = Waiting {
            item,
            reply,
            _bytes: permit,
        };
        if self.queue.send(waiting).await.is_err() {
            return Err(stopped());
        }
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

/// The runtime that the producer was connected on has ended.
fn stopped() -> Box<Refusal> {
    Box::new(Refusal::from_call(&Status::unavailable(
        "the producer's sending task has stopped",
    )))
}

async fn send_all<V: Verb>(
    client: MessagesClient<Channel>,
    producer: String,
    mut queue: mpsc::Receiver<Waiting<V>>,
) {
    let mut left_over = None;
    loop {
        let first = match left_over.take() {
            Some(waiting) => waiting,
            None => match queue.recv().await {
                Some(waiting) => waiting,
                None => return,
            },
        };
        // Callers that the last reply woke come along, if they have something to send.
        tokio::task::yield_now().await;
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(waiting) = next.take() {
            // Who gave up does not need the call any more.
            if !waiting.reply.is_closed() {
                let size = V::bytes(&waiting.item);
                if !batch.is_empty() && bytes + size > MAX_BATCH_BYTES {
                    left_over = Some(waiting);
                    break;
                }
                bytes += size;
                batch.push(waiting);
            }
            if batch.len() < MAX_ITEMS {
                next = queue.try_recv().ok();
            }
        }
        if !batch.is_empty() {
            send_batch(&client, &producer, batch).await;
        }
    }
}

async fn send_batch<V: Verb>(
    client: &MessagesClient<Channel>,
    producer: &str,
    batch: Vec<Waiting<V>>,
) {
    let refusal = match call::<V>(client, producer, &batch).await {
        Ok(results) => return hand_out(batch, results),
        Err(refusal) => refusal,
    };
    // One malformed item must not refuse its neighbours: each goes on its own.
    if batch.len() > 1 && matches!(refusal.code, Code::InvalidArgument | Code::OutOfRange) {
        for waiting in batch {
            let alone = vec![waiting];
            match call::<V>(client, producer, &alone).await {
                Ok(results) => hand_out(alone, results),
                Err(refusal) => refuse(alone, &refusal),
            }
        }
        return;
    }
    refuse(batch, &refusal);
}

async fn call<V: Verb>(
    client: &MessagesClient<Channel>,
    producer: &str,
    batch: &[Waiting<V>],
) -> Result<Answered<V::Reply>, Refusal> {
    let items = batch.iter().map(|waiting| waiting.item.clone()).collect();
    let call = V::call(client.clone(), producer.to_owned(), items);
    match timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(results)) => Ok(results),
        Ok(Err(status)) => Err(Refusal::from_call(&status)),
        Err(_) => Err(Refusal::from_call(&Status::deadline_exceeded(format!(
            "no answer in {} ms",
            CALL_TIMEOUT.as_millis()
        )))),
    }
}

fn hand_out<V: Verb>(batch: Vec<Waiting<V>>, results: Answered<V::Reply>) {
    let mut results = results.into_iter();
    for waiting in batch {
        let outcome = match results.next() {
            Some((id, outcome)) if id == V::id(&waiting.item) => outcome,
            _ => Err(Box::new(Refusal::of_reply(
                "the reply does not answer the items in order",
            ))),
        };
        // Who gave up meanwhile is not interested.
        drop(waiting.reply.send(outcome));
    }
}

fn refuse<V: Verb>(batch: Vec<Waiting<V>>, refusal: &Refusal) {
    for waiting in batch {
        drop(waiting.reply.send(Err(Box::new(refusal.clone()))));
    }
}
