//! The named places where a test or the demo may end a process.
//!
//! Every durable step of the service and of both SDKs passes a point before and after it is
//! durable. A build without the feature `enabled` compiles them to nothing. With it, the
//! environment variable [`ENVIRONMENT`] arms points when [`arm_from_environment`] is called;
//! no RPC and no file can.
//!
//! The list exists once, in the macro call below, and [`Point::ALL`] comes from it: a crash
//! test that walks it cannot forget a point.

use std::fmt;

/// The environment variable that arms points: `name=action`, separated by `;`.
///
/// An action is `abort@N` (the process aborts when the point is passed for the Nth time) or
/// anything the crate `fail` understands, such as `sleep(500)`, `return` or `20%return`.
pub const ENVIRONMENT: &str = "HANDFAST_FAIL_POINTS";

/// A named place in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    name: &'static str,
}

impl Point {
    /// The name that arms it: `party.step.moment`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Who passes it: `service`, `producer` or `consumer`.
    pub fn party(self) -> &'static str {
        self.name
            .split_once('.')
            .map_or(self.name, |(party, _)| party)
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal;)*) => {
        impl Point {
            $($(#[$doc])* pub const $point: Point = Point { name: $name };)*

            /// Every point there is, in the order of a message's life.
            pub const ALL: &'static [Point] = &[$(Point::$point),*];
        }
    };
}

points! {
    /// A topology is written but not committed.
    TOPOLOGY_BEFORE_COMMIT = "service.topology.before-commit";
    /// A topology is durable.
    TOPOLOGY_AFTER_COMMIT = "service.topology.after-commit";
    /// Prepared messages are written but not committed.
    PREPARE_BEFORE_COMMIT = "service.prepare.before-commit";
    /// Prepared messages are durable, nobody was told.
    PREPARE_AFTER_COMMIT = "service.prepare.after-commit";
    /// Published messages are written but not committed.
    PUBLISH_BEFORE_COMMIT = "service.publish.before-commit";
    /// Published messages are durable, nobody was told.
    PUBLISH_AFTER_COMMIT = "service.publish.after-commit";
    /// Confirms or cancels are written but not committed.
    DECIDE_BEFORE_COMMIT = "service.decide.before-commit";
    /// Confirms or cancels are durable, nobody was told.
    DECIDE_AFTER_COMMIT = "service.decide.after-commit";
    /// Messages to check are leased but not committed.
    CLAIM_CHECKS_BEFORE_COMMIT = "service.claim-checks.before-commit";
    /// Messages to check are leased, the producer was not asked.
    CLAIM_CHECKS_AFTER_COMMIT = "service.claim-checks.after-commit";
    /// The results of a check are written but not committed.
    SETTLE_CHECKS_BEFORE_COMMIT = "service.settle-checks.before-commit";
    /// The results of a check are durable.
    SETTLE_CHECKS_AFTER_COMMIT = "service.settle-checks.after-commit";
    /// What confirms have leased to this process waits in its memory, nothing was sent.
    RELAY_HANDED = "service.relay.handed";
    /// Due deliveries are leased but not committed.
    CLAIM_BEFORE_COMMIT = "service.claim.before-commit";
    /// Due deliveries are leased, nothing was sent.
    CLAIM_AFTER_COMMIT = "service.claim.after-commit";
    /// Deliveries were handed to the consumer's stream.
    DELIVER_AFTER_WRITE = "service.deliver.after-write";
    /// RabbitMQ has confirmed deliveries, SENT is not written.
    RELAY_CONFIRMED = "service.relay.confirmed";
    /// Answers from RabbitMQ are durable, their message is not acked.
    ANSWERS_RECORDED = "service.answers.recorded";
    /// SENT is written but not committed.
    SENT_BEFORE_COMMIT = "service.sent.before-commit";
    /// SENT is durable.
    SENT_AFTER_COMMIT = "service.sent.after-commit";
    /// Answers are written but not committed.
    ACKNOWLEDGE_BEFORE_COMMIT = "service.acknowledge.before-commit";
    /// Answers are durable, the consumer was not told.
    ACKNOWLEDGE_AFTER_COMMIT = "service.acknowledge.after-commit";
    /// The deliveries of an ended stream are returned but not committed.
    RETURN_BEFORE_COMMIT = "service.return.before-commit";
    /// The deliveries of an ended stream are due again.
    RETURN_AFTER_COMMIT = "service.return.after-commit";
    /// The recovery pass has written its decisions but not committed.
    RECOVER_BEFORE_COMMIT = "service.recover.before-commit";
    /// The recovery pass's decisions are durable.
    RECOVER_AFTER_COMMIT = "service.recover.after-commit";
    /// What a replica says of itself is written but not committed.
    ANNOUNCE_BEFORE_COMMIT = "service.announce.before-commit";
    /// The others can read what a replica says of itself.
    ANNOUNCE_AFTER_COMMIT = "service.announce.after-commit";
    /// A replica has its turn at a pass, or not, but nothing is committed.
    TURN_BEFORE_COMMIT = "service.turn.before-commit";
    /// A replica has its turn, or knows that it has not, and has done nothing with it.
    TURN_AFTER_COMMIT = "service.turn.after-commit";
    /// A slice of finished messages is removed but not committed.
    RETIRE_BEFORE_COMMIT = "service.retire.before-commit";
    /// A slice of finished messages is gone.
    RETIRE_AFTER_COMMIT = "service.retire.after-commit";

    /// Prepare was answered OK, the business transaction has not begun.
    PRODUCER_PREPARED = "producer.transact.prepared";
    /// The fence row is in the open business transaction.
    PRODUCER_FENCED = "producer.transact.fenced";
    /// The business is done, its transaction is not committed.
    PRODUCER_BEFORE_COMMIT = "producer.transact.before-commit";
    /// The business transaction is committed, nothing is confirmed.
    PRODUCER_AFTER_COMMIT = "producer.transact.after-commit";
    /// With `return`: the confirm is not sent, as if the network had lost it.
    PRODUCER_LOSE_CONFIRM = "producer.transact.lose-confirm";
    /// The confirm was answered.
    PRODUCER_AFTER_CONFIRM = "producer.transact.after-confirm";
    /// The business rolled back, its fence row is not written.
    PRODUCER_ROLLED_BACK = "producer.rollback.rolled-back";
    /// The rollback is fenced, nothing is cancelled.
    PRODUCER_ROLLBACK_FENCED = "producer.rollback.fenced";
    /// A check has written its fence row but not committed.
    PRODUCER_CHECK_BEFORE_COMMIT = "producer.check.before-commit";
    /// A check's verdict is durable, Handfast was not told.
    PRODUCER_CHECK_AFTER_COMMIT = "producer.check.after-commit";

    /// The inbox rows are in the open transaction, the handler has not run.
    CONSUMER_INBOX_WRITTEN = "consumer.inbox.written";
    /// The effect is in the open transaction.
    CONSUMER_BEFORE_COMMIT = "consumer.effect.before-commit";
    /// The effect is durable, Handfast was not told.
    CONSUMER_AFTER_COMMIT = "consumer.effect.after-commit";
    /// RabbitMQ has confirmed the answers, their deliveries are not acked.
    CONSUMER_PUBLISHED = "consumer.answer.published";
    /// Handfast has recorded the answers, or RabbitMQ has and their deliveries are acked.
    CONSUMER_ANSWERED = "consumer.answer.recorded";
}

/// Passes a point: does what the point is armed with, by default nothing.
#[inline]
pub fn hit(point: Point) {
    skips(point);
}

/// Passes a point that can leave out the step behind it. True if it is armed with `return`.
#[cfg(feature = "enabled")]
pub fn skips(point: Point) -> bool {
    fail::fail_point!(point.name, |_| true);
    false
}

/// Passes a point that can leave out the step behind it. Without the feature, never.
#[cfg(not(feature = "enabled"))]
#[inline]
pub fn skips(_point: Point) -> bool {
    false
}

/// Arms the points that [`ENVIRONMENT`] names. An unknown point or action is an error, so
/// that a test cannot pass because its fault never happened.
#[cfg(feature = "enabled")]
pub fn arm_from_environment() -> Result<(), String> {
    match std::env::var(ENVIRONMENT) {
        Ok(list) => list
            .split(';')
            .filter(|entry| !entry.is_empty())
            .try_for_each(arm),
        Err(_) => Ok(()),
    }
}

/// Does nothing: this build has no points.
#[cfg(not(feature = "enabled"))]
pub fn arm_from_environment() -> Result<(), String> {
    Ok(())
}

/// Arms one point with `name=action`.
#[cfg(feature = "enabled")]
pub fn arm(entry: &str) -> Result<(), String> {
    use std::sync::atomic::{AtomicU64, Ordering};

    let (name, action) = entry
        .split_once('=')
        .ok_or_else(|| format!("fail point `{entry}` has no action"))?;
    if !Point::ALL.iter().any(|point| point.name == name) {
        return Err(format!("there is no fail point `{name}`"));
    }
    let Some(nth) = action.strip_prefix("abort@") else {
        return fail::cfg(name, action).map_err(|error| format!("fail point `{entry}`: {error}"));
    };
    let nth: u64 = nth
        .parse()
        .map_err(|_| format!("fail point `{entry}`: abort@N needs N"))?;
    let passed = AtomicU64::new(0);
    fail::cfg_callback(name, move || {
        if passed.fetch_add(1, Ordering::SeqCst) + 1 == nth {
            std::process::abort();
        }
    })
    .map_err(|error| format!("fail point `{entry}`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_name_their_party() {
        let mut names: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Point::ALL.len());
        for point in Point::ALL {
            assert!(
                ["service", "producer", "consumer"].contains(&point.party()),
                "{point}"
            );
        }
    }

    #[cfg(feature = "enabled")]
    #[test]
    fn a_point_that_does_not_exist_cannot_be_armed() {
        assert!(arm("service.nothing=abort@1").is_err());
        assert!(arm("service.prepare.before-commit").is_err());
        assert!(arm("service.prepare.before-commit=explode").is_err());
    }

    #[cfg(feature = "enabled")]
    #[test]
    fn a_point_armed_with_return_skips() {
        arm("producer.transact.lose-confirm=return").unwrap();
        assert!(skips(Point::PRODUCER_LOSE_CONFIRM));
        assert!(!skips(Point::PRODUCER_AFTER_CONFIRM));
    }
}
