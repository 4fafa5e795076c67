//! What happened to one message, in order of time.
//!
//! What always happens is read from columns; what is rare has rows of its own. Both are put
//! into one list here. Things of the same microsecond follow in the order of a life.

use std::collections::HashSet;

use super::Timestamp;
use crate::message::{DeliveryState, MessageState};
use crate::store::{DecidedBy, DeliveryView, EventView, MessageView, Shown};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineEntry {
    /// When.
    pub at: Timestamp,
    /// One word of the API's list.
    pub kind: String,
    /// For whom; empty for what concerns the message itself.
    pub subscription: String,
    /// For people.
    pub detail: String,
}

/// The words in the order of a life; a word that is not here comes last.
const ORDER: [&str; 15] = [
    "prepared",
    "check",
    "unresolved",
    "confirmed",
    "cancelled",
    "conflict",
    "sent",
    "returned",
    "failed",
    "later",
    "resend",
    "rejected",
    "consumed",
    "dead",
    "skipped",
];

/// The timeline of a message.
pub(crate) fn of(shown: &Shown) -> Vec<TimelineEntry> {
    let mut entries: Vec<_> = shown.events.iter().map(of_event).collect();
    let told: HashSet<(String, String, Timestamp)> = entries
        .iter()
        .map(|entry| (entry.kind.clone(), entry.subscription.clone(), entry.at))
        .collect();
    let mut columns = of_message(&shown.message);
    columns.extend(shown.deliveries.iter().flat_map(of_delivery));
    // An event row says more than the column that was written with it.
    columns.retain(|entry| {
        !told.contains(&(entry.kind.clone(), entry.subscription.clone(), entry.at))
    });
    entries.extend(columns);
    entries.sort_by(|a, b| {
        (a.at, rank(&a.kind), &a.subscription).cmp(&(b.at, rank(&b.kind), &b.subscription))
    });
    entries
}

fn rank(kind: &str) -> usize {
    ORDER
        .iter()
        .position(|known| *known == kind)
        .unwrap_or(ORDER.len())
}

fn of_event(event: &EventView) -> TimelineEntry {
    TimelineEntry {
        at: event.at,
        kind: event.kind.clone(),
        subscription: event.subscription.clone().unwrap_or_default(),
        detail: event.detail.clone(),
    }
}

fn of_message(message: &MessageView) -> Vec<TimelineEntry> {
    let entry = |at, kind: &str, detail: &str| TimelineEntry {
        at,
        kind: kind.to_owned(),
        subscription: String::new(),
        detail: detail.to_owned(),
    };
    let by = match message.decided_by {
        Some(DecidedBy::Producer) => "by the producer",
        Some(DecidedBy::Check) => "by a status check",
        Some(DecidedBy::Operator) => "by an operator",
        None => "",
    };
    let decided = match message.state {
        MessageState::Prepared => None,
        MessageState::Confirmed => Some("confirmed"),
        MessageState::Cancelled => Some("cancelled"),
    };
    let mut entries = vec![entry(message.prepared_at, "prepared", "")];
    if let (Some(at), Some(kind)) = (message.decided_at, decided) {
        entries.push(entry(at, kind, by));
    }
    entries
}

fn of_delivery(delivery: &DeliveryView) -> Vec<TimelineEntry> {
    let entry = |at, kind: &str, detail: String| TimelineEntry {
        at,
        kind: kind.to_owned(),
        subscription: delivery.subscription.clone(),
        detail,
    };
    let mut entries = Vec::new();
    if let Some(first) = delivery.first_sent_at {
        entries.push(entry(first, "sent", String::new()));
        // The event `resend` says when and why it was decided; this is when it happened.
        if let Some(last) = delivery.sent_at.filter(|last| *last > first) {
            let detail = format!("send {}", delivery.generation);
            entries.push(entry(last, "sent", detail));
        }
    }
    if let (DeliveryState::Consumed, Some(at)) = (delivery.state, delivery.answered_at) {
        entries.push(entry(at, "consumed", String::new()));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageId;

    const T: fn(i64) -> Timestamp = Timestamp::from_micros;

    fn shown() -> Shown {
        let id = MessageId::from(uuid::Uuid::from_u128(1));
        Shown {
            message: MessageView {
                id,
                producer: "payment".into(),
                topic: "payment.completed".into(),
                key: None,
                state: MessageState::Confirmed,
                decided_by: Some(DecidedBy::Check),
                prepared_at: T(1),
                decided_at: Some(T(5)),
                checks: 1,
                check_at: None,
                unresolved: false,
                conflict: false,
                unsubscribed: false,
            },
            deliveries: vec![DeliveryView {
                id,
                subscription: "accounting".into(),
                state: DeliveryState::Consumed,
                attempts: 1,
                generation: 2,
                due_at: None,
                first_sent_at: Some(T(5)),
                sent_at: Some(T(9)),
                answered_at: Some(T(11)),
                last_error: None,
            }],
            events: vec![
                event(5, "check", None),
                event(8, "failed", Some("accounting")),
            ],
            body: None,
        }
    }

    fn event(at: i64, kind: &str, subscription: Option<&str>) -> EventView {
        EventView {
            at: T(at),
            kind: kind.into(),
            subscription: subscription.map(str::to_owned),
            detail: "told by its row".into(),
        }
    }

    fn told(shown: &Shown) -> Vec<(i64, String)> {
        of(shown)
            .into_iter()
            .map(|entry| (entry.at.as_micros(), entry.kind))
            .collect()
    }

    #[test]
    fn columns_and_events_become_one_story_in_order() {
        let expected = [
            (1, "prepared"),
            (5, "check"),
            (5, "confirmed"),
            (5, "sent"),
            (8, "failed"),
            (9, "sent"),
            (11, "consumed"),
        ];
        let expected: Vec<_> = expected
            .into_iter()
            .map(|(at, kind)| (at, kind.to_owned()))
            .collect();
        assert_eq!(told(&shown()), expected);
    }

    #[test]
    fn what_an_event_tells_is_not_told_twice() {
        let mut shown = shown();
        shown.events.push(event(9, "sent", Some("accounting")));
        let sends: Vec<_> = of(&shown)
            .into_iter()
            .filter(|entry| entry.kind == "sent" && entry.at == T(9))
            .collect();
        assert_eq!(sends.len(), 1);
        assert_eq!(sends[0].detail, "told by its row");
    }

    #[test]
    fn a_message_that_waits_tells_only_that_it_was_prepared() {
        let mut shown = shown();
        shown.message.state = MessageState::Prepared;
        shown.message.decided_at = None;
        shown.message.decided_by = None;
        shown.deliveries.clear();
        shown.events.clear();
        assert_eq!(told(&shown), [(1, "prepared".to_owned())]);
    }

    #[test]
    fn an_unknown_word_comes_last_of_its_moment() {
        let mut shown = shown();
        shown.events.push(event(1, "something-new", None));
        assert_eq!(told(&shown)[1].1, "something-new");
        assert_eq!(told(&shown)[0].1, "prepared");
    }
}
