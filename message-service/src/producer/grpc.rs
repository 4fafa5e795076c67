//! Asks producers over gRPC: `handfast.v1.BusinessStatus`.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use handfast_proto::v1;
use handfast_proto::v1::business_status_client::BusinessStatusClient;
use tonic::transport::{Channel, Endpoint};

use super::{Question, StatusSource, Unreachable, VerdictKind};
use crate::message::MessageId;

/// Channels that are kept. Registered endpoints are far fewer; the bound only keeps endpoints
/// that were registered once from piling up.
const MAX_CHANNELS: usize = 1_000;

/// How long a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Until the connection stands. A host that does not answer at all must not cost more.
    pub connect_timeout: Duration,
    /// Until the whole reply was read: more than the 2 s that a status server may take.
    pub call_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            call_timeout: Duration::from_secs(5),
        }
    }
}

/// Asks over gRPC, with one lazily connected channel per endpoint.
#[derive(Debug, Default)]
pub struct GrpcStatus {
    settings: Settings,
    channels: Mutex<HashMap<String, Channel>>,
}

impl GrpcStatus {
    /// Asks with these time-outs.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            channels: Mutex::default(),
        }
    }

    fn channel(&self, endpoint: &str) -> Result<Channel, tonic::transport::Error> {
        // A panic while the lock is held leaves a map of whole channels.
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(endpoint) {
            return Ok(channel.clone());
        }
        let channel = Endpoint::from_shared(endpoint.to_owned())?
            .user_agent("handfast")?
            .connect_timeout(self.settings.connect_timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(30)))
            // A peer that vanished without a word is noticed by the next call at the latest.
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(self.settings.call_timeout)
            .connect_lazy();
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        channels.insert(endpoint.to_owned(), channel.clone());
        Ok(channel)
    }
}

#[async_trait]
impl StatusSource for GrpcStatus {
    async fn check(
        &self,
        endpoint: &str,
        questions: Vec<Question>,
    ) -> Result<Vec<Option<VerdictKind>>, Unreachable> {
        let unreachable = |reason: String| Unreachable {
            endpoint: endpoint.to_owned(),
            reason,
        };
        let channel = self
            .channel(endpoint)
            .map_err(|error| unreachable(format!("the endpoint cannot be used: {error}")))?;
        let mut client = BusinessStatusClient::new(channel)
            .max_decoding_message_size(handfast_proto::MAX_CHECK_REPLY_BYTES);
        let asked: Vec<MessageId> = questions.iter().map(|question| question.id).collect();
        let mut request = tonic::Request::new(v1::CheckRequest {
            questions: questions.into_iter().map(v1::Question::from).collect(),
        });
        // The server learns the deadline and need not work for nobody; the time-out below does
        // not depend on its good will.
        request.set_timeout(self.settings.call_timeout);
        match tokio::time::timeout(self.settings.call_timeout, client.check(request)).await {
            Ok(Ok(reply)) => Ok(verdicts(&asked, &reply.into_inner().verdicts)),
            Ok(Err(status)) => Err(unreachable(describe(&status))),
            Err(_) => Err(unreachable(format!(
                "no reply within {} ms",
                self.settings.call_timeout.as_millis()
            ))),
        }
    }
}

/// The code, the server's text, and the deepest cause, which is what names a refused connection.
fn describe(status: &tonic::Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut cause = status.source();
    while let Some(deeper) = cause.and_then(std::error::Error::source) {
        cause = Some(deeper);
    }
    if let Some(cause) = cause {
        text = format!("{text} ({cause})");
    }
    text
}

/// Reads a reply: one entry per id that was asked, in order. Ids that were not asked are
/// passed over; an id with two verdicts, an unset one or one that this version does not know
/// has none.
fn verdicts(asked: &[MessageId], reply: &[v1::Verdict]) -> Vec<Option<VerdictKind>> {
    let mut found: HashMap<MessageId, Option<VerdictKind>> = HashMap::new();
    for verdict in reply {
        let Some(id) = MessageId::from_bytes(&verdict.message_id) else {
            continue;
        };
        found
            .entry(id)
            .and_modify(|kind| *kind = None)
            .or_insert_with(|| kind(verdict.kind));
    }
    asked
        .iter()
        .map(|id| found.get(id).copied().flatten())
        .collect()
}

fn kind(wire: i32) -> Option<VerdictKind> {
    match v1::VerdictKind::try_from(wire) {
        Ok(v1::VerdictKind::Committed) => Some(VerdictKind::Committed),
        Ok(v1::VerdictKind::RolledBack) => Some(VerdictKind::RolledBack),
        Ok(v1::VerdictKind::InProgress) => Some(VerdictKind::InProgress),
        Ok(v1::VerdictKind::Unknown) => Some(VerdictKind::Unknown),
        Ok(v1::VerdictKind::Unspecified) | Err(_) => None,
    }
}

impl From<Question> for v1::Question {
    fn from(question: Question) -> Self {
        Self {
            message_id: question.id.as_bytes().to_vec(),
            topic: question.topic,
            key: question.key,
            fence: question
                .fence
                .map(|fence| fence.as_bytes().to_vec())
                .unwrap_or_default(),
            prepared_at: question.prepared_at.as_micros(),
        }
    }
}

#[cfg(test)]
mod tests;
