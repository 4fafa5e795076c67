//! What a reply means for the messages that were asked about. Pure.

use std::time::Duration;

use crate::producer::VerdictKind;
use crate::store::{CheckClaim, CheckResult};

/// One result per claim. Where the reply has no verdict (also if it is too short) the check is
/// not answered, does not count, and is due again after `retry_after`.
pub(super) fn plan(
    claims: Vec<CheckClaim>,
    verdicts: &[Option<VerdictKind>],
    retry_after: Duration,
) -> Vec<(CheckClaim, CheckResult)> {
    claims
        .into_iter()
        .enumerate()
        .map(|(place, claim)| {
            let verdict = verdicts.get(place).copied().flatten();
            (claim, result(verdict, retry_after))
        })
        .collect()
}

fn result(verdict: Option<VerdictKind>, retry_after: Duration) -> CheckResult {
    match verdict {
        Some(VerdictKind::Committed) => CheckResult::Committed,
        Some(VerdictKind::RolledBack) => CheckResult::RolledBack,
        Some(VerdictKind::InProgress) => CheckResult::Undecided { in_progress: true },
        Some(VerdictKind::Unknown) => CheckResult::Undecided { in_progress: false },
        None => CheckResult::Unanswered { retry_after },
    }
}

/// How long to wait for a producer that has not answered this many times in a row (1 is the
/// first): doubling from `first` to `slowest`, then spread over the upper half, so that a
/// service that asks many producers does not ask them all at the same moment. `chance` is
/// from 0 to 1.
pub(super) fn back_off(failures: u32, first: Duration, slowest: Duration, chance: f64) -> Duration {
    let doubled = first.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1).min(30)));
    doubled
        .min(slowest)
        .mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::message::Timestamp;

    const RETRY: Duration = Duration::from_secs(3);

    fn claim(n: u128) -> CheckClaim {
        CheckClaim {
            id: Uuid::from_u128(n).into(),
            token: Uuid::from_u128(100 + n),
            topic: "payment.completed".to_owned(),
            key: None,
            fence: None,
            prepared_at: Timestamp::from_micros(1),
            checks: 0,
        }
    }

    fn results(verdicts: &[Option<VerdictKind>], claims: u128) -> Vec<CheckResult> {
        plan((1..=claims).map(claim).collect(), verdicts, RETRY)
            .into_iter()
            .map(|(_, result)| result)
            .collect()
    }

    #[test]
    fn every_verdict_has_its_result() {
        assert_eq!(
            results(
                &[
                    Some(VerdictKind::Committed),
                    Some(VerdictKind::RolledBack),
                    Some(VerdictKind::InProgress),
                    Some(VerdictKind::Unknown),
                    None,
                ],
                5
            ),
            [
                CheckResult::Committed,
                CheckResult::RolledBack,
                CheckResult::Undecided { in_progress: true },
                CheckResult::Undecided { in_progress: false },
                CheckResult::Unanswered { retry_after: RETRY },
            ]
        );
    }

    #[test]
    fn a_reply_that_is_too_short_answers_only_what_it_reaches() {
        assert_eq!(
            results(&[Some(VerdictKind::Committed)], 2),
            [
                CheckResult::Committed,
                CheckResult::Unanswered { retry_after: RETRY }
            ]
        );
    }

    #[test]
    fn a_reply_that_is_too_long_invents_no_message() {
        assert_eq!(
            results(&[None, Some(VerdictKind::Committed)], 1),
            [CheckResult::Unanswered { retry_after: RETRY }]
        );
    }

    #[test]
    fn results_stay_with_their_claims() {
        let planned = plan(vec![claim(1), claim(2)], &[None, None], RETRY);
        assert_eq!(planned[0].0, claim(1));
        assert_eq!(planned[1].0, claim(2));
    }

    #[test]
    fn probes_become_rarer_up_to_the_slowest() {
        let first = Duration::from_millis(500);
        let slowest = Duration::from_secs(30);
        let wait = |failures| back_off(failures, first, slowest, 1.0);
        assert_eq!(wait(1), first);
        assert_eq!(wait(2), 2 * first);
        assert_eq!(wait(7), slowest);
        assert_eq!(wait(u32::MAX), slowest);
        assert_eq!(back_off(1, first, slowest, 0.0), first / 2);
    }
}
