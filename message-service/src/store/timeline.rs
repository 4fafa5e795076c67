//! The lines of a timeline that no column tells, the same for every store.

use crate::message::AnswerKind;
use crate::message::delivery::{DeliveryEvent, Outcome};

/// What is written down when an event did this to a delivery: kind and detail, at most two.
pub(super) fn lines(
    happened: &DeliveryEvent<'_>,
    outcome: &Outcome,
) -> impl Iterator<Item = (&'static str, String)> {
    let dead = match outcome {
        Outcome::Dead { error, .. } => Some(("dead", error.clone())),
        Outcome::Again { .. }
        | Outcome::Consumed
        | Outcome::Skipped
        | Outcome::AlreadySo
        | Outcome::Stale => None,
    };
    line(happened, outcome).into_iter().chain(dead)
}

/// What happened.
fn line(happened: &DeliveryEvent<'_>, outcome: &Outcome) -> Option<(&'static str, String)> {
    match happened {
        // CONSUMED is told by columns, unless it corrects what was given up.
        DeliveryEvent::Answer(_, AnswerKind::Consumed) => None,
        DeliveryEvent::Answer(generation, AnswerKind::Failed(reason)) => {
            Some(("failed", format!("send {generation}: {reason}")))
        }
        DeliveryEvent::Answer(generation, AnswerKind::Later(wait)) => Some((
            "later",
            format!("send {generation}: after {} ms", wait.as_millis()),
        )),
        DeliveryEvent::Answer(generation, AnswerKind::Rejected(reason)) => {
            Some(("rejected", format!("send {generation}: {reason}")))
        }
        DeliveryEvent::PassedBy(generation) => {
            Some(("resend", format!("send {generation} was passed by")))
        }
        DeliveryEvent::StreamEnded { generation, .. } => {
            let detail = match outcome {
                Outcome::Again {
                    error: Some(reason),
                    ..
                } => reason.clone(),
                _ => format!("send {generation}: the stream ended before an answer"),
            };
            Some(("returned", detail))
        }
        DeliveryEvent::Refused { reason, .. } => Some(("returned", (*reason).to_owned())),
        DeliveryEvent::Suspected(reason) => Some((
            "returned",
            format!("the broker closed the channel: {reason}"),
        )),
        DeliveryEvent::Untried | DeliveryEvent::TooOld => None,
        DeliveryEvent::Skip => Some(("skipped", String::new())),
    }
}
