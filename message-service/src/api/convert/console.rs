//! What operators ask for and what they are shown.

use handfast_proto::v1 as proto;

use super::{ID_BYTES, decided_by, delivery_state, headers, message_state};
use crate::service::{
    BrokerState, CountsView, DeliveryCursor, DeliveryState, DeliveryView, Error, Invalid,
    MessageFilter, MessageId, MessageState, MessageView, QueueState, ReplicaView, ShownMessage,
    SubscriptionCounts, TimelineEntry, Timestamp, limits,
};

/// How many of what, and who is there.
pub(in crate::api) fn counts(view: CountsView) -> proto::CountsResponse {
    let counts = view.store;
    let subscription = |((counts, consumers), queue): ((SubscriptionCounts, u32), QueueState)| {
        proto::SubscriptionCounts {
            subscription: counts.name,
            topic: counts.topic,
            active: counts.active,
            pending: counts.pending,
            sent: counts.sent,
            dead: counts.dead,
            oldest_open_at: counts.oldest_open_at.map(Timestamp::as_micros),
            consumers,
            in_queue: queue.waiting,
            trouble: queue.trouble,
        }
    };
    let (state, reason) = match view.broker {
        BrokerState::Up => (proto::BrokerState::Up, String::new()),
        BrokerState::Blocked(reason) => (proto::BrokerState::Blocked, reason),
        BrokerState::Down(reason) => (proto::BrokerState::Down, reason),
    };
    let producer = |((producer, prepared), unreachable)| proto::ProducerCounts {
        producer,
        prepared,
        unreachable,
    };
    let subscriptions = counts.subscriptions.into_iter().zip(view.consumers);
    let subscriptions = subscriptions.zip(view.queues);
    let producers = counts.producers.into_iter().zip(view.unreachable);
    proto::CountsResponse {
        prepared: counts.prepared,
        confirmed: counts.confirmed,
        cancelled: counts.cancelled,
        unresolved: counts.unresolved,
        conflict: counts.conflict,
        unsubscribed: counts.unsubscribed,
        unknown: counts.unknown,
        subscriptions: subscriptions.map(subscription).collect(),
        producers: producers.map(producer).collect(),
        broker: Some(proto::BrokerCounts {
            state: state as i32,
            reason,
            unreadable_answers: view.answers.unreadable,
            unknown_answers: view.answers.unknown,
            foreign_answers: view.answers.foreign,
            answers_trouble: view.answers.trouble,
        }),
    }
}

/// A process of the service.
pub(in crate::api) fn replica(replica: ReplicaView) -> proto::Replica {
    proto::Replica {
        replica_id: replica.id.as_bytes().to_vec(),
        version: replica.version,
        address: replica.address,
        started_at: replica.started_at.as_micros(),
        seen_at: replica.seen_at.as_micros(),
        deliveries: replica.deliveries,
        checks: replica.checks,
    }
}

/// Everything about one message.
pub(in crate::api) fn shown(shown: ShownMessage) -> proto::ShowMessageResponse {
    let (header_list, payload) = shown.body.unwrap_or_default();
    let entry = |entry: TimelineEntry| proto::TimelineEntry {
        at: entry.at.as_micros(),
        kind: entry.kind,
        subscription: entry.subscription,
        detail: entry.detail,
    };
    proto::ShowMessageResponse {
        message: Some(message_row(shown.message)),
        deliveries: shown.deliveries.into_iter().map(delivery_row).collect(),
        timeline: shown.timeline.into_iter().map(entry).collect(),
        headers: headers(header_list),
        payload,
    }
}

/// A message as operators see it.
pub(in crate::api) fn message_row(row: MessageView) -> proto::MessageRow {
    proto::MessageRow {
        message_id: row.id.as_bytes().to_vec(),
        producer: row.producer,
        topic: row.topic,
        key: row.key,
        state: message_state(row.state) as i32,
        decided_by: decided_by(row.decided_by) as i32,
        prepared_at: row.prepared_at.as_micros(),
        decided_at: row.decided_at.map(Timestamp::as_micros),
        checks: row.checks,
        next_check_at: row.check_at.map(Timestamp::as_micros),
        unresolved: row.unresolved,
        conflict: row.conflict,
        unsubscribed: row.unsubscribed,
    }
}

/// A delivery as operators see it.
pub(in crate::api) fn delivery_row(row: DeliveryView) -> proto::DeliveryRow {
    proto::DeliveryRow {
        message_id: row.id.as_bytes().to_vec(),
        subscription: row.subscription,
        state: delivery_state(row.state) as i32,
        attempts: row.attempts,
        generation: row.generation,
        due_at: row.due_at.map(Timestamp::as_micros),
        first_sent_at: row.first_sent_at.map(Timestamp::as_micros),
        sent_at: row.sent_at.map(Timestamp::as_micros),
        answered_at: row.answered_at.map(Timestamp::as_micros),
        last_error: row.last_error.unwrap_or_default(),
    }
}

/// Which messages a list shows: one state or one flag.
pub(in crate::api) fn message_filter(state: i32, flag: &str) -> Result<MessageFilter, Error> {
    let state = match proto::MessageState::try_from(state) {
        Ok(proto::MessageState::Unspecified) => None,
        Ok(proto::MessageState::Prepared) => Some(MessageState::Prepared),
        Ok(proto::MessageState::Confirmed) => Some(MessageState::Confirmed),
        Ok(proto::MessageState::Cancelled) => Some(MessageState::Cancelled),
        Err(_) => return Err(Invalid::new("state", "is no state of a message").into()),
    };
    match (state, flag) {
        (Some(state), "") => Ok(MessageFilter::State(state)),
        (None, "unresolved") => Ok(MessageFilter::Unresolved),
        (None, "conflict") => Ok(MessageFilter::Conflict),
        (None, "unsubscribed") => Ok(MessageFilter::Unsubscribed),
        (None, "") => Err(Invalid::new("state", "is missing; give a state or a flag").into()),
        (Some(_), _) => Err(Invalid::new("flag", "cannot be combined with a state").into()),
        (None, _) => {
            let reason = "is none of `unresolved`, `conflict`, `unsubscribed`";
            Err(Invalid::new("flag", reason).into())
        }
    }
}

/// Which deliveries a list shows.
pub(in crate::api) fn delivery_filter(state: i32) -> Result<DeliveryState, Error> {
    match proto::DeliveryState::try_from(state) {
        Ok(proto::DeliveryState::Pending) => Ok(DeliveryState::Pending),
        Ok(proto::DeliveryState::Sent) => Ok(DeliveryState::Sent),
        Ok(proto::DeliveryState::Consumed) => Ok(DeliveryState::Consumed),
        Ok(proto::DeliveryState::Dead) => Ok(DeliveryState::Dead),
        Ok(proto::DeliveryState::Skipped) => Ok(DeliveryState::Skipped),
        Ok(proto::DeliveryState::Unspecified) | Err(_) => {
            Err(Invalid::new("state", "is no state of a delivery").into())
        }
    }
}

/// Where a page of messages begins.
pub(in crate::api) fn message_cursor(cursor: &[u8]) -> Result<Option<MessageId>, Error> {
    match cursor {
        [] => Ok(None),
        bytes => Ok(Some(
            MessageId::from_bytes(bytes).ok_or_else(no_cursor_of_ours)?,
        )),
    }
}

/// Where a page of deliveries begins: the id, then the subscription.
pub(in crate::api) fn delivery_cursor(cursor: &[u8]) -> Result<Option<DeliveryCursor>, Error> {
    if cursor.is_empty() {
        return Ok(None);
    }
    let (id, name) = cursor
        .split_at_checked(ID_BYTES)
        .ok_or_else(no_cursor_of_ours)?;
    let id = MessageId::from_bytes(id).ok_or_else(no_cursor_of_ours)?;
    let name = std::str::from_utf8(name).map_err(|_| no_cursor_of_ours())?;
    limits::name("cursor", name)?;
    Ok(Some((name.to_owned(), id)))
}

fn no_cursor_of_ours() -> Invalid {
    Invalid::new("cursor", "is none that a page before gave")
}

/// The cursor of the page behind this delivery.
pub(in crate::api) fn write_delivery_cursor((subscription, id): &DeliveryCursor) -> Vec<u8> {
    [id.as_bytes().as_slice(), subscription.as_bytes()].concat()
}

#[cfg(test)]
mod tests;
