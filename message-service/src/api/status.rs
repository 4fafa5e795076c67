//! The one place where an error becomes a status, for a call and for an item alike.
//!
//! What a program can act on goes into `google.rpc` details; the text is for people. Causes
//! inside the service were logged where they were met and are not sent.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _, pb};

use crate::service::{Error, MessageId, MessageState, Refusal};

/// The domain of every `ErrorInfo`.
const DOMAIN: &str = "handfast";

/// Refuses a whole call.
pub(super) fn of_call(error: &Error) -> Status {
    Status::with_error_details(code(error), error.to_string(), details(error))
}

/// Refuses one item of a list.
pub(super) fn of_item(error: &Error) -> pb::Status {
    let status = of_call(error);
    // Without details tonic carries no bytes, and an item still needs code and text.
    prost::Message::decode(status.details())
        .ok()
        .filter(|item: &pb::Status| item.code != 0)
        .unwrap_or_else(|| pb::Status {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Vec::new(),
        })
}

fn code(error: &Error) -> Code {
    match error {
        Error::Invalid(_) => Code::InvalidArgument,
        Error::UnknownProducer(_)
        | Error::UnknownTopic(_)
        | Error::UnknownSubscription(_)
        | Error::UnknownMessage(_)
        | Error::Refused(Refusal::NoSuchMessage(_)) => Code::NotFound,
        Error::TopicNotAllowed { .. } | Error::AnswersByAmqpOnly { .. } => Code::PermissionDenied,
        Error::NoSubscriber { .. }
        | Error::NoStatusEndpoint { .. }
        | Error::Refused(Refusal::WrongState { .. }) => Code::FailedPrecondition,
        Error::TooManyUndecided { .. } | Error::BacklogFull { .. } | Error::Overloaded { .. } => {
            Code::ResourceExhausted
        }
        Error::Refused(
            Refusal::IdTaken(_) | Refusal::OtherContent { .. } | Refusal::KeyHeld { .. },
        ) => Code::AlreadyExists,
        Error::Unavailable => Code::Unavailable,
        Error::Internal => Code::Internal,
    }
}

fn details(error: &Error) -> ErrorDetails {
    let mut details = ErrorDetails::new();
    match error {
        Error::Invalid(invalid) => {
            details.add_bad_request_violation(&invalid.field, &invalid.reason);
        }
        Error::UnknownProducer(name) => resource(&mut details, "producer", name, error),
        Error::UnknownTopic(name) => resource(&mut details, "topic", name, error),
        Error::UnknownSubscription(name) => resource(&mut details, "subscription", name, error),
        Error::UnknownMessage(id) | Error::Refused(Refusal::NoSuchMessage(id)) => {
            resource(&mut details, "message", &id.to_string(), error);
        }
        Error::TopicNotAllowed { topic, .. } => {
            info(&mut details, "TOPIC_NOT_ALLOWED", [("topic", topic)]);
        }
        Error::AnswersByAmqpOnly { subscription } => {
            let metadata = [("subscription", subscription)];
            info(&mut details, "ANSWERS_BY_AMQP_ONLY", metadata);
        }
        Error::NoSubscriber { topic } => info(&mut details, "NO_SUBSCRIBER", [("topic", topic)]),
        Error::NoStatusEndpoint { producer } => {
            info(&mut details, "NO_STATUS_ENDPOINT", [("producer", producer)]);
        }
        Error::TooManyUndecided { limit, .. } => {
            info(&mut details, "TOO_MANY_UNDECIDED", [("limit", limit)]);
        }
        Error::BacklogFull { limit_bytes, .. } => {
            info(&mut details, "BACKLOG_FULL", [("limit_bytes", limit_bytes)]);
        }
        Error::Overloaded { .. } => info::<&str, 0>(&mut details, "OVERLOADED", []),
        Error::Refused(Refusal::OtherContent { id, state }) => {
            holder(&mut details, "CONTENT_DIFFERS", id, state);
        }
        Error::Refused(Refusal::KeyHeld { holder: id, state }) => {
            holder(&mut details, "KEY_HELD", id, state);
        }
        Error::Refused(Refusal::WrongState { id, wrong }) => {
            holder(&mut details, "WRONG_STATE", id, &wrong.state);
        }
        // Nothing is said about another producer's message.
        Error::Refused(Refusal::IdTaken(_)) | Error::Unavailable | Error::Internal => {}
    }
    if let Some(delay) = error.retry_after() {
        details.set_retry_info(Some(delay));
    }
    details
}

fn resource(details: &mut ErrorDetails, kind: &str, name: &str, error: &Error) {
    details.set_resource_info(kind, name, "", error.to_string());
}

fn holder(details: &mut ErrorDetails, reason: &str, id: &MessageId, state: &MessageState) {
    let metadata = [("message_id", id.to_string()), ("state", state.to_string())];
    info(details, reason, metadata);
}

fn info<V: ToString, const N: usize>(
    details: &mut ErrorDetails,
    reason: &str,
    metadata: [(&str, V); N],
) {
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_string()))
        .collect();
    details.set_error_info(reason, DOMAIN, metadata);
}

#[cfg(test)]
mod tests {
    use tonic_types::RpcStatusExt as _;

    use super::*;
    use crate::service::{MessageEvent, WrongState};

    fn id() -> MessageId {
        MessageId::from(uuid::Uuid::from_u128(7))
    }

    #[test]
    fn a_held_key_names_its_holder_and_the_holders_state() {
        let item = of_item(&Error::Refused(Refusal::KeyHeld {
            holder: id(),
            state: MessageState::Confirmed,
        }));
        assert_eq!(item.code, Code::AlreadyExists as i32);
        let info = item.get_details_error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("KEY_HELD", DOMAIN)
        );
        assert_eq!(
            info.metadata["message_id"],
            "00000000-0000-0000-0000-000000000007"
        );
        assert_eq!(info.metadata["state"], "CONFIRMED");
    }

    #[test]
    fn nothing_is_said_about_another_producers_message() {
        let item = of_item(&Error::Refused(Refusal::IdTaken(id())));
        assert_eq!(item.code, Code::AlreadyExists as i32);
        assert!(!item.message.is_empty());
        assert!(item.details.is_empty());
    }

    #[test]
    fn a_wrong_state_names_the_state() {
        let wrong = WrongState {
            event: MessageEvent::Confirm,
            state: MessageState::Cancelled,
        };
        let item = of_item(&Error::Refused(Refusal::WrongState { id: id(), wrong }));
        assert_eq!(item.code, Code::FailedPrecondition as i32);
        let info = item.get_details_error_info().unwrap();
        assert_eq!(info.reason, "WRONG_STATE");
        assert_eq!(info.metadata["state"], "CANCELLED");
    }

    #[test]
    fn what_is_unknown_is_named_with_its_kind() {
        for (error, kind, name) in [
            (
                Error::UnknownProducer("p".into()),
                "producer",
                "p".to_owned(),
            ),
            (Error::UnknownTopic("t".into()), "topic", "t".to_owned()),
            (
                Error::UnknownSubscription("s".into()),
                "subscription",
                "s".to_owned(),
            ),
            (Error::UnknownMessage(id()), "message", id().to_string()),
        ] {
            let status = of_call(&error);
            assert_eq!(status.code(), Code::NotFound);
            let resource = status.get_details_resource_info().unwrap();
            assert_eq!(
                (resource.resource_type.as_str(), resource.resource_name),
                (kind, name)
            );
        }
    }

    #[test]
    fn whoever_may_come_back_is_told_when() {
        for error in [
            Error::Unavailable,
            Error::Overloaded { what: "calls" },
            Error::BacklogFull {
                backlog_bytes: 2,
                limit_bytes: 1,
            },
            Error::TooManyUndecided {
                producer: "p".into(),
                limit: 1,
            },
        ] {
            let status = of_call(&error);
            assert!(status.get_details_retry_info().is_some(), "{error}");
        }
        assert!(of_call(&Error::Internal).get_details_retry_info().is_none());
    }
}
