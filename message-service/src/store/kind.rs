//! The kinds of writes that every store has: they name errors and fail points.

use handfast_fail_points::Point;

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Topology,
    Prepare,
    Publish,
    Decide,
    ClaimChecks,
    SettleChecks,
    Claim,
    Sent,
    Acknowledge,
    Return,
    Recover,
    Retire,
    Announce,
    Turn,
}

impl Kind {
    /// What is attempted, for errors.
    pub(super) const fn doing(self) -> &'static str {
        match self {
            Self::Topology => "apply the topology",
            Self::Prepare => "prepare messages",
            Self::Publish => "publish messages",
            Self::Decide => "confirm or cancel messages",
            Self::ClaimChecks => "claim messages to check",
            Self::SettleChecks => "write the results of checks",
            Self::Claim => "claim deliveries",
            Self::Sent => "mark deliveries SENT",
            Self::Acknowledge => "acknowledge deliveries",
            Self::Return => "take deliveries back",
            Self::Recover => "write what the recovery pass decided",
            Self::Retire => "remove finished messages",
            Self::Announce => "say that this replica is there",
            Self::Turn => "take the turn at a pass",
        }
    }

    /// Whether it can leave deliveries that are to be sent.
    pub(super) const fn makes_due(self) -> bool {
        match self {
            Self::Publish
            | Self::Decide
            | Self::SettleChecks
            | Self::Acknowledge
            | Self::Return
            | Self::Recover => true,
            Self::Topology
            | Self::Prepare
            | Self::ClaimChecks
            | Self::Claim
            | Self::Sent
            | Self::Retire
            | Self::Announce
            | Self::Turn => false,
        }
    }

    /// The fail points before and after it is durable.
    pub(super) const fn points(self) -> (Point, Point) {
        match self {
            Self::Topology => (Point::TOPOLOGY_BEFORE_COMMIT, Point::TOPOLOGY_AFTER_COMMIT),
            Self::Prepare => (Point::PREPARE_BEFORE_COMMIT, Point::PREPARE_AFTER_COMMIT),
            Self::Publish => (Point::PUBLISH_BEFORE_COMMIT, Point::PUBLISH_AFTER_COMMIT),
            Self::Decide => (Point::DECIDE_BEFORE_COMMIT, Point::DECIDE_AFTER_COMMIT),
            Self::ClaimChecks => (
                Point::CLAIM_CHECKS_BEFORE_COMMIT,
                Point::CLAIM_CHECKS_AFTER_COMMIT,
            ),
            Self::SettleChecks => (
                Point::SETTLE_CHECKS_BEFORE_COMMIT,
                Point::SETTLE_CHECKS_AFTER_COMMIT,
            ),
            Self::Claim => (Point::CLAIM_BEFORE_COMMIT, Point::CLAIM_AFTER_COMMIT),
            Self::Sent => (Point::SENT_BEFORE_COMMIT, Point::SENT_AFTER_COMMIT),
            Self::Acknowledge => (
                Point::ACKNOWLEDGE_BEFORE_COMMIT,
                Point::ACKNOWLEDGE_AFTER_COMMIT,
            ),
            Self::Return => (Point::RETURN_BEFORE_COMMIT, Point::RETURN_AFTER_COMMIT),
            Self::Recover => (Point::RECOVER_BEFORE_COMMIT, Point::RECOVER_AFTER_COMMIT),
            Self::Retire => (Point::RETIRE_BEFORE_COMMIT, Point::RETIRE_AFTER_COMMIT),
            Self::Announce => (Point::ANNOUNCE_BEFORE_COMMIT, Point::ANNOUNCE_AFTER_COMMIT),
            Self::Turn => (Point::TURN_BEFORE_COMMIT, Point::TURN_AFTER_COMMIT),
        }
    }
}
