//! Group commit on the client's side: while one call of a verb is in flight, further items
//! of that verb collect, and the next call carries them all.
//!
//! No timer takes part: a lone item goes out at once. Each caller gets its own item's result.
//! Every address has a call of its own in flight, so one that does not answer holds up nothing
//! but what it was sent. There are never more calls than that, however much is repeated.

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::MAX_ITEMS;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::endpoints::Endpoints;
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
    /// Starts the tasks that send; they end when the lane is dropped.
    pub(crate) fn start(endpoints: &Arc<Endpoints>, producer: &str) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_QUEUED_ITEMS);
        let queued = Arc::new(Mutex::new(Queued {
            waiting,
            left_over: None,
        }));
        for number in 0..endpoints.all.len() {
            let sender = Sender {
                endpoints: Arc::clone(endpoints),
                number,
                producer: producer.to_owned(),
                queued: Arc::clone(&queued),
            };
            tokio::spawn(sender.run());
        }
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

/// What waits for a call.
struct Queued<V: Verb> {
    waiting: mpsc::Receiver<Waiting<V>>,
    /// What did not fit into the last one.
    left_over: Option<Waiting<V>>,
}

impl<V: Verb> Queued<V> {
    /// Waits for the first item, and takes what else is there. `None` if nothing will come.
    /// Nothing is lost if the future is dropped while it waits for the first.
    async fn batch(&mut self) -> Option<Vec<Waiting<V>>> {
        if self.left_over.is_none() {
            self.left_over = Some(self.waiting.recv().await?);
        }
        // Callers that the last reply woke come along, if they have something to send.
        tokio::task::yield_now().await;
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = self.left_over.take();
        while let Some(waiting) = next.take() {
            // Who gave up does not need the call any more.
            if !waiting.reply.is_closed() {
                let size = V::bytes(&waiting.item);
                if !batch.is_empty() && bytes + size > MAX_BATCH_BYTES {
                    self.left_over = Some(waiting);
                    break;
                }
                bytes += size;
                batch.push(waiting);
            }
            if batch.len() < MAX_ITEMS {
                next = self.waiting.try_recv().ok();
            }
        }
        Some(batch)
    }
}

/// The task that sends to one address.
struct Sender<V: Verb> {
    endpoints: Arc<Endpoints>,
    number: usize,
    producer: String,
    queued: Arc<Mutex<Queued<V>>>,
}

impl<V: Verb> Sender<V> {
    async fn run(self) {
        loop {
            tokio::select! {
                () = self.endpoints.until(self.number, true) => {}
                () = self.endpoints.stop.cancelled() => return,
            }
            // Waiting for the lock is waiting for a turn: it is given in order.
            let batch = async { self.queued.lock().await.batch().await };
            let batch = tokio::select! {
                biased;
                () = self.endpoints.until(self.number, false) => continue,
                batch = batch => batch,
            };
            let Some(batch) = batch else {
                return;
            };
            if !batch.is_empty() {
                self.send(batch).await;
            }
        }
    }

    async fn send(&self, batch: Vec<Waiting<V>>) {
        let (refusal, _) = match self.call(&batch).await {
            Ok(results) => return hand_out(batch, results),
            Err(failed) => failed,
        };
        // One malformed item must not refuse its neighbours: each goes on its own.
        if batch.len() > 1 && matches!(refusal.code, Code::InvalidArgument | Code::OutOfRange) {
            let mut gone = None;
            for waiting in batch {
                if waiting.reply.is_closed() {
                    continue;
                }
                let alone = vec![waiting];
                if let Some(refusal) = &gone {
                    refuse(alone, refusal);
                    continue;
                }
                match self.call(&alone).await {
                    Ok(results) => hand_out(alone, results),
                    Err((refusal, is_away)) => {
                        refuse(alone, &refusal);
                        // The others are repeated elsewhere.
                        gone = is_away.then_some(refusal);
                    }
                }
            }
            return;
        }
        refuse(batch, &refusal);
    }

    /// The refusal says, too, whether the address is out of turn because of it.
    async fn call(&self, batch: &[Waiting<V>]) -> Result<Answered<V::Reply>, (Refusal, bool)> {
        let items = batch.iter().map(|waiting| waiting.item.clone()).collect();
        let client = self.endpoints.all[self.number].clone();
        let call = V::call(client, self.producer.clone(), items);
        let failure = match timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(results)) => {
                self.endpoints.worked(self.number);
                return Ok(results);
            }
            Ok(Err(status)) => status,
            Err(_) => {
                Status::deadline_exceeded(format!("no answer in {} ms", CALL_TIMEOUT.as_millis()))
            }
        };
        let is_away = self.endpoints.failed(self.number, &failure);
        Err((Refusal::from_call(&failure), is_away))
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
