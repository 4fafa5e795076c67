//! Lost, or only late? Pure.

use super::Settings;
use crate::message::Timestamp;
use crate::store::{Overdue, OverdueDecision};

/// One decision per overdue delivery. `gone` says for each whether its queue is known not to
/// hold it (no word is no); `through` is the latest send that its subscription answered.
pub(super) fn plan(
    overdue: Vec<Overdue>,
    gone: &[bool],
    through: Option<Timestamp>,
    settings: &Settings,
) -> Vec<(Overdue, OverdueDecision)> {
    overdue
        .into_iter()
        .enumerate()
        .map(|(place, delivery)| {
            let gone = gone.get(place).copied().unwrap_or(false);
            let passed = through
                .is_some_and(|through| through >= delivery.sent_at.after(settings.passed_by));
            let decision = if gone || passed {
                OverdueDecision::PassedBy
            } else {
                OverdueDecision::Wait(settings.resend_after)
            };
            (delivery, decision)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const SENT: Timestamp = Timestamp::from_micros(1_000_000_000);

    fn decide(gone: &[bool], through: Option<Timestamp>) -> OverdueDecision {
        let overdue = Overdue {
            id: Uuid::from_u128(1).into(),
            generation: 1,
            sent_at: SENT,
            due_at: SENT,
        };
        plan(vec![overdue], gone, through, &Settings::default())[0].1
    }

    fn wait() -> OverdueDecision {
        OverdueDecision::Wait(Settings::default().resend_after)
    }

    #[test]
    fn silence_alone_is_never_loss() {
        assert_eq!(decide(&[false], None), wait());
        assert_eq!(decide(&[], None), wait());
    }

    #[test]
    fn what_was_sent_well_after_it_and_answered_passes_it_by() {
        let passed_by = Settings::default().passed_by;
        let enough = SENT.after(passed_by);
        assert_eq!(decide(&[false], Some(enough)), OverdueDecision::PassedBy);
        let too_little = Timestamp::from_micros(enough.as_micros() - 1);
        assert_eq!(decide(&[false], Some(too_little)), wait());
    }

    #[test]
    fn what_its_queue_does_not_hold_is_lost() {
        assert_eq!(decide(&[true], None), OverdueDecision::PassedBy);
    }
}
