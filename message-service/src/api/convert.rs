//! Between the contract and the domain: what comes in is parsed here, and what goes out is
//! written here, so that neither side knows the other's types.

pub(super) mod console;

use std::time::Duration;

use handfast_proto::v1 as proto;

use super::status;
use crate::service::embedded::Sending;
use crate::service::{
    Answer, AnswerKind, AnswerOutcome, Answers, DecidedBy, DeliveryState, DeliveryView, Ids,
    Invalid, ItemResult, MessageId, MessageState, NewMessage, Status, Submission, Timestamp,
    limits,
};

/// The id at the front of a cursor and everywhere else.
const ID_BYTES: usize = 16;

/// A list of messages, each as far as it could be read.
pub(super) fn submission(producer: String, messages: Vec<proto::NewMessage>) -> Submission {
    let bytes = messages.iter().map(prost::Message::encoded_len).sum();
    let messages = messages
        .into_iter()
        .map(|message| new_message(&producer, message))
        .collect();
    Submission {
        producer,
        messages,
        bytes,
    }
}

fn new_message(producer: &str, message: proto::NewMessage) -> Result<NewMessage, Invalid> {
    let id = message_id("id", &message.id)?;
    let fence = match message.fence.as_slice() {
        [] => None,
        bytes => Some(uuid::Uuid::from_slice(bytes).map_err(|_| wrong_length("fence", bytes))?),
    };
    Ok(NewMessage {
        id,
        producer: producer.to_owned(),
        topic: message.topic,
        key: message.key,
        content_type: message.content_type,
        headers: message
            .headers
            .into_iter()
            .map(|header| (header.name, header.value))
            .collect(),
        payload: message.payload.into(),
        deliver_after: message.deliver_after.map(Timestamp::from_micros),
        fence,
    })
}

/// One id.
pub(super) fn message_id(field: &str, bytes: &[u8]) -> Result<MessageId, Invalid> {
    MessageId::from_bytes(bytes).ok_or_else(|| match bytes.len() {
        ID_BYTES => Invalid::new(field, "is the nil id"),
        _ => wrong_length(field, bytes),
    })
}

fn wrong_length(field: &str, bytes: &[u8]) -> Invalid {
    let reason = format!("size {} bytes, an id has {ID_BYTES} bytes", bytes.len());
    Invalid::new(field, reason)
}

/// A list of ids, each as far as it could be read.
pub(super) fn ids(producer: String, message_ids: &[Vec<u8>]) -> Ids {
    Ids {
        producer,
        ids: message_ids
            .iter()
            .enumerate()
            .map(|(index, id)| message_id(&format!("message_ids[{index}]"), id))
            .collect(),
        bytes: message_ids.iter().map(Vec::len).sum(),
    }
}

/// What became of each item, beside the id as it was sent.
pub(super) fn item_results(
    ids: Vec<Vec<u8>>,
    results: Vec<ItemResult<MessageState>>,
) -> Vec<proto::ItemResult> {
    let result = |(message_id, result): (Vec<u8>, ItemResult<MessageState>)| proto::ItemResult {
        message_id,
        outcome: Some(match result {
            Ok(state) => proto::item_result::Outcome::State(message_state(state) as i32),
            Err(error) => proto::item_result::Outcome::Error(status::of_item(&error)),
        }),
    };
    ids.into_iter().zip(results).map(result).collect()
}

/// What a producer asked about, beside the id as it was sent.
pub(super) fn get_results(
    ids: Vec<Vec<u8>>,
    results: Vec<ItemResult<Status>>,
) -> Vec<proto::GetResult> {
    let result = |(message_id, result): (Vec<u8>, ItemResult<Status>)| proto::GetResult {
        message_id,
        outcome: Some(match result {
            Ok(found) => proto::get_result::Outcome::Status(message_status(found)),
            Err(error) => proto::get_result::Outcome::Error(status::of_item(&error)),
        }),
    };
    ids.into_iter().zip(results).map(result).collect()
}

fn message_status(found: Status) -> proto::MessageStatus {
    let Status {
        message,
        deliveries,
    } = found;
    let delivery = |delivery: DeliveryView| proto::DeliveryStatus {
        subscription: delivery.subscription,
        state: delivery_state(delivery.state) as i32,
        attempts: delivery.attempts,
    };
    proto::MessageStatus {
        state: message_state(message.state) as i32,
        decided_by: decided_by(message.decided_by) as i32,
        topic: message.topic,
        key: message.key,
        prepared_at: message.prepared_at.as_micros(),
        decided_at: message.decided_at.map(Timestamp::as_micros),
        checks: message.checks,
        unresolved: message.unresolved,
        conflict: message.conflict,
        unsubscribed: message.unsubscribed,
        deliveries: deliveries.into_iter().map(delivery).collect(),
    }
}

/// A list of answers, each as far as it could be read.
pub(super) fn answers(subscription: String, answers: Vec<proto::Answer>) -> Answers {
    let bytes = answers.iter().map(prost::Message::encoded_len).sum();
    Answers {
        subscription,
        answers: answers.into_iter().enumerate().map(answer).collect(),
        bytes,
    }
}

fn answer((index, answer): (usize, proto::Answer)) -> Result<Option<Answer>, Invalid> {
    // No delivery can have such an id, and that is what the consumer is told: it drops it.
    let Some(id) = MessageId::from_bytes(&answer.message_id) else {
        return Ok(None);
    };
    let kind = match answer.kind() {
        proto::AnswerKind::Unspecified => {
            let reason = format!("{} is no kind of answer", answer.kind);
            return Err(Invalid::new(format!("answers[{index}].kind"), reason));
        }
        proto::AnswerKind::Consumed => AnswerKind::Consumed,
        proto::AnswerKind::Failed => AnswerKind::Failed(limits::reason(answer.reason)),
        proto::AnswerKind::Later => AnswerKind::Later(later(index, answer.later_ms)?),
        proto::AnswerKind::Rejected => AnswerKind::Rejected(limits::reason(answer.reason)),
    };
    Ok(Some(Answer {
        id,
        generation: answer.generation,
        sent_at: (answer.sent_at > 0).then(|| Timestamp::from_micros(answer.sent_at)),
        kind,
    }))
}

fn later(index: usize, later_ms: i64) -> Result<Duration, Invalid> {
    let limit_ms = limits::LATER.as_millis();
    match u64::try_from(later_ms) {
        Ok(ms) if u128::from(ms) <= limit_ms => Ok(Duration::from_millis(ms)),
        Ok(_) | Err(_) => Err(Invalid::new(
            format!("answers[{index}].later_ms"),
            format!("{later_ms} ms is outside of 0 to {limit_ms} ms"),
        )),
    }
}

/// What became of each answer, beside the id as it was sent.
pub(super) fn answer_results(
    ids: Vec<Vec<u8>>,
    results: Vec<ItemResult<AnswerOutcome>>,
) -> Vec<proto::AnswerResult> {
    let result = |(message_id, result): (Vec<u8>, ItemResult<AnswerOutcome>)| {
        let (outcome, error) = match result {
            Ok(AnswerOutcome::Recorded) => (proto::AnswerOutcome::Recorded, None),
            Ok(AnswerOutcome::Stale) => (proto::AnswerOutcome::Stale, None),
            Ok(AnswerOutcome::NoSuchDelivery) => (proto::AnswerOutcome::NoSuchDelivery, None),
            Err(error) => (proto::AnswerOutcome::Invalid, Some(status::of_item(&error))),
        };
        proto::AnswerResult {
            message_id,
            outcome: outcome as i32,
            error,
        }
    };
    ids.into_iter().zip(results).map(result).collect()
}

fn message_state(state: MessageState) -> proto::MessageState {
    match state {
        MessageState::Prepared => proto::MessageState::Prepared,
        MessageState::Confirmed => proto::MessageState::Confirmed,
        MessageState::Cancelled => proto::MessageState::Cancelled,
    }
}

fn delivery_state(state: DeliveryState) -> proto::DeliveryState {
    match state {
        DeliveryState::Pending => proto::DeliveryState::Pending,
        DeliveryState::Sent => proto::DeliveryState::Sent,
        DeliveryState::Consumed => proto::DeliveryState::Consumed,
        DeliveryState::Dead => proto::DeliveryState::Dead,
        DeliveryState::Skipped => proto::DeliveryState::Skipped,
    }
}

fn decided_by(by: Option<DecidedBy>) -> proto::DecidedBy {
    match by {
        Some(DecidedBy::Producer) => proto::DecidedBy::Producer,
        Some(DecidedBy::Check) => proto::DecidedBy::Check,
        Some(DecidedBy::Operator) => proto::DecidedBy::Operator,
        None => proto::DecidedBy::Unspecified,
    }
}

/// Headers in the producer's order.
fn headers(headers: Vec<(String, String)>) -> Vec<proto::Header> {
    headers
        .into_iter()
        .map(|(name, value)| proto::Header { name, value })
        .collect()
}

/// A delivery on its way to a consumer of this subscription.
pub(super) fn delivery(subscription: &str, sending: Sending) -> proto::Delivery {
    let claim = sending.claim;
    proto::Delivery {
        message_id: claim.id.as_bytes().to_vec(),
        subscription: subscription.to_owned(),
        topic: claim.topic,
        producer: claim.producer,
        key: claim.key,
        content_type: claim.content_type,
        headers: headers(claim.headers),
        payload: claim.payload.into(),
        generation: claim.generation,
        sent_at: claim.sent_at.as_micros(),
        first_sent_at: claim.first_sent_at.as_micros(),
        alone: sending.alone,
    }
}

#[cfg(test)]
mod tests;
