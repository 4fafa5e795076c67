//! What a subscription is told, as every store's column holds it: one JSON object, so that a
//! new setting needs no new column.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::{Attempts, DeliveryPolicy};
use crate::topology::Subscription;

#[derive(Serialize, Deserialize)]
struct Stored {
    schedule_ms: Vec<u64>,
    /// `null` is unlimited.
    attempts: Option<u32>,
    max_age_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_in_queue: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    amqp_user: Option<String>,
}

/// The text of the column.
pub(super) fn to_json(subscription: &Subscription) -> Result<String, serde_json::Error> {
    let policy = &subscription.policy;
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    serde_json::to_string(&Stored {
        schedule_ms: policy.schedule.iter().copied().map(millis).collect(),
        attempts: match policy.attempts {
            Attempts::Limited(most) => Some(most),
            Attempts::Unlimited => None,
        },
        max_age_ms: policy.max_age.map(millis),
        max_in_queue: subscription.max_in_queue,
        amqp_user: subscription.amqp_user.clone(),
    })
}

/// The subscription on this topic; `None` if the text says something else than expected.
pub(super) fn from_json(topic: String, text: &str) -> Option<Subscription> {
    let stored: Stored = serde_json::from_str(text).ok()?;
    Some(Subscription {
        topic,
        policy: DeliveryPolicy {
            schedule: stored
                .schedule_ms
                .into_iter()
                .map(Duration::from_millis)
                .collect(),
            attempts: stored
                .attempts
                .map_or(Attempts::Unlimited, Attempts::Limited),
            max_age: stored.max_age_ms.map(Duration::from_millis),
        },
        max_in_queue: stored.max_in_queue,
        amqp_user: stored.amqp_user,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_comes_back() {
        let subscription = Subscription {
            topic: "payment.completed".into(),
            policy: DeliveryPolicy {
                schedule: vec![Duration::from_millis(5)],
                attempts: Attempts::Unlimited,
                max_age: Some(Duration::from_secs(7)),
            },
            max_in_queue: Some(9),
            amqp_user: Some("accounting".into()),
        };
        let text = to_json(&subscription).unwrap();
        assert_eq!(
            from_json("payment.completed".into(), &text),
            Some(subscription)
        );
    }

    #[test]
    fn what_an_older_version_wrote_is_read() {
        let text = r#"{"schedule_ms":[1000],"attempts":10,"max_age_ms":null}"#;
        let read = from_json("t".into(), text).unwrap();
        assert_eq!((read.max_in_queue, read.amqp_user), (None, None));
    }
}
