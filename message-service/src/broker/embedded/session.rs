//! What the API has of a stream: the credit that goes in, and the deliveries that come out.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Embedded;
use super::held::StreamId;
use crate::store::DeliveryClaim;

/// A delivery for the consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sending {
    /// What is sent.
    pub claim: DeliveryClaim,
    /// It came back unanswered before, and nothing else is sent until it is answered.
    pub alone: bool,
}

/// Both sides of an open stream. Dropping it means that the client is gone.
#[derive(Debug)]
pub struct Session {
    grants: Grants,
    sendings: Sendings,
}

/// The request side: may be used from another task, and outlive the stream.
#[derive(Clone, Debug)]
pub struct Grants {
    embedded: Arc<Embedded>,
    subscription: String,
    stream: StreamId,
    over: CancellationToken,
}

/// The response side. Dropping it means that the client is gone: what was handed to it and is
/// not answered is returned.
#[derive(Debug)]
pub struct Sendings {
    batches: mpsc::Receiver<Vec<Sending>>,
    _client_gone: DropGuard,
}

/// The session, and the place where its stream puts batches: one at a time, so that what the
/// client does not take is not claimed.
pub(super) fn channel(
    embedded: Arc<Embedded>,
    subscription: String,
    stream: StreamId,
    over: &CancellationToken,
) -> (Session, mpsc::Sender<Vec<Sending>>) {
    let (sender, batches) = mpsc::channel(1);
    let session = Session {
        grants: Grants {
            embedded,
            subscription,
            stream,
            over: over.clone(),
        },
        sendings: Sendings {
            batches,
            _client_gone: over.clone().drop_guard(),
        },
    };
    (session, sender)
}

impl Session {
    /// The two sides, for two tasks.
    pub fn split(self) -> (Grants, Sendings) {
        (self.grants, self.sendings)
    }

    /// See [`Grants::credit`].
    pub fn credit(&self, credit: u32) {
        self.grants.credit(credit);
    }

    /// See [`Grants::half_close`].
    pub fn half_close(&self) {
        self.grants.half_close();
    }

    /// See [`Grants::lost`].
    pub fn lost(&self) {
        self.grants.lost();
    }

    /// See [`Sendings::next`].
    pub async fn next(&mut self) -> Option<Vec<Sending>> {
        self.sendings.next().await
    }

    /// True if no batch is ready.
    #[cfg(test)]
    pub(super) fn sendings_is_empty(&self) -> bool {
        self.sendings.batches.is_empty()
    }
}

impl Grants {
    /// The consumer asks for this many deliveries more. The credit is at most 10,000.
    pub fn credit(&self, credit: u32) {
        if let Some(stream) = self.embedded.lock().stream(&self.subscription, self.stream) {
            stream.grant(credit);
        }
    }

    /// No more credit will come. The stream ends when the credit is used up and everything on
    /// it is answered.
    pub fn half_close(&self) {
        if let Some(stream) = self.embedded.lock().stream(&self.subscription, self.stream) {
            stream.half_close();
        }
    }

    /// The client is gone: the stream ends, and what it held is due again.
    pub fn lost(&self) {
        self.over.cancel();
    }
}

impl Sendings {
    /// The next batch, never empty; `None` when the stream is over. May be dropped and called
    /// again without losing anything.
    pub async fn next(&mut self) -> Option<Vec<Sending>> {
        self.batches.recv().await
    }
}

impl futures_util::Stream for Sendings {
    type Item = Vec<Sending>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.batches.poll_recv(context)
    }
}
