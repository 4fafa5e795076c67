//! Who dies how: the planned lives of the four processes.

use std::fmt;

use handfast_fail_points::Point;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::Role;

/// How one life of a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// SIGKILL from outside.
    Kill,
    /// It aborts where it passes the point for the `nth` time in this life.
    Abort {
        /// The named place in its code.
        point: Point,
        /// Counted from 1.
        nth: u64,
    },
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill => f.write_str("SIGKILL"),
            Self::Abort { point, nth } => write!(f, "abort at {point} the {nth}. time"),
        }
    }
}

/// One planned life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    /// How it ends.
    pub(crate) death: Death,
    /// How many orders are settled when SIGKILL comes. For an abort it is the latest moment;
    /// None waits for the abort until everything else is over, and then SIGKILL comes.
    pub(crate) at: Option<u64>,
    /// How long the process stays away afterwards, in milliseconds.
    pub(crate) away_ms: u64,
}

/// From which sizes on a process dies how often: service, payment, accounting, points.
const DEATHS: [(u64, [usize; 4]); 4] = [
    (500, [3, 4, 3, 3]),
    (50, [2, 3, 2, 2]),
    (10, [1, 2, 1, 1]),
    (0, [1, 1, 1, 1]),
];

/// Below this a moment in the load means nothing: every abort is waited for.
const FEW_PAYMENTS: u64 = 10;

/// Aborts that a run is not complete without: they are waited for, whatever the size.
const PROMISED: [Point; 3] = [
    Point::PRODUCER_AFTER_COMMIT,
    Point::PRODUCER_BEFORE_COMMIT,
    Point::CONSUMER_AFTER_COMMIT,
];

/// Where the service is busy under this load.
const SERVICE_POINTS: [Point; 9] = [
    Point::PREPARE_BEFORE_COMMIT,
    Point::PREPARE_AFTER_COMMIT,
    Point::DECIDE_BEFORE_COMMIT,
    Point::DECIDE_AFTER_COMMIT,
    Point::CLAIM_BEFORE_COMMIT,
    Point::CLAIM_AFTER_COMMIT,
    Point::DELIVER_AFTER_WRITE,
    Point::ACKNOWLEDGE_BEFORE_COMMIT,
    Point::ACKNOWLEDGE_AFTER_COMMIT,
];

/// The same, with PostgreSQL and RabbitMQ.
const SERVICE_POINTS_ON_SERVERS: [Point; 11] = [
    Point::PREPARE_BEFORE_COMMIT,
    Point::PREPARE_AFTER_COMMIT,
    Point::DECIDE_BEFORE_COMMIT,
    Point::DECIDE_AFTER_COMMIT,
    Point::RELAY_HANDED,
    Point::CLAIM_BEFORE_COMMIT,
    Point::CLAIM_AFTER_COMMIT,
    Point::RELAY_CONFIRMED,
    Point::ACKNOWLEDGE_BEFORE_COMMIT,
    Point::ACKNOWLEDGE_AFTER_COMMIT,
    Point::ANSWERS_RECORDED,
];

/// What else may happen to a producer. All of these are passed at least now and then.
const PRODUCER_POINTS: [Point; 7] = [
    Point::PRODUCER_PREPARED,
    Point::PRODUCER_FENCED,
    Point::PRODUCER_AFTER_CONFIRM,
    Point::PRODUCER_ROLLED_BACK,
    Point::PRODUCER_ROLLBACK_FENCED,
    Point::PRODUCER_CHECK_BEFORE_COMMIT,
    Point::PRODUCER_CHECK_AFTER_COMMIT,
];

/// What else may happen to a consumer.
const CONSUMER_POINTS: [Point; 4] = [
    Point::CONSUMER_INBOX_WRITTEN,
    Point::CONSUMER_BEFORE_COMMIT,
    Point::CONSUMER_AFTER_COMMIT,
    Point::CONSUMER_ANSWERED,
];

/// The deaths of one process, spread over the load so that each life does some work.
pub(super) fn draw(chance: &mut StdRng, role: Role, payments: u64, on_servers: bool) -> Vec<Life> {
    let count = DEATHS
        .iter()
        .find(|(from, _)| payments >= *from)
        .map_or(1, |(_, counts)| counts[role as usize]);
    let mut ways = ways(chance, role, on_servers);
    ways.truncate(count);
    ways.shuffle(chance);
    // The load's last fifth is left to those who come back.
    let slot = (payments * 7 / 10 / count as u64).max(1);
    let begin = payments / 10;
    let last = ways.len().saturating_sub(1);
    let life = |(index, way): (usize, Option<Point>)| {
        let slot_begins = begin + slot * index as u64;
        let at = slot_begins + chance.random_range(slot / 2..=slot);
        let nth = way.map_or(1, |point| nth(chance, point, slot));
        let away_ms = chance.random_range(match role {
            Role::Service | Role::Payment => 50..=250,
            // Long enough that something has piled up when they come back.
            Role::Accounting | Role::Points => 200..=600,
        });
        Life {
            death: way.map_or(Death::Kill, |point| Death::Abort { point, nth }),
            at: match way {
                Some(point)
                    if payments < FEW_PAYMENTS || index == last || PROMISED.contains(&point) =>
                {
                    None
                }
                Some(_) => Some(slot_begins + slot),
                None => Some(at.min(payments)),
            },
            away_ms,
        }
    };
    ways.into_iter().enumerate().map(life).collect()
}

/// How a process is to die, the most telling way first; None is SIGKILL.
fn ways(chance: &mut StdRng, role: Role, on_servers: bool) -> Vec<Option<Point>> {
    let service_points: &[Point] = match on_servers {
        true => &SERVICE_POINTS_ON_SERVERS,
        false => &SERVICE_POINTS,
    };
    let mut one_of = |points: &[Point]| Some(points[chance.random_range(0..points.len())]);
    match role {
        Role::Service => vec![one_of(service_points), None, one_of(service_points)],
        Role::Payment => vec![
            Some(Point::PRODUCER_AFTER_COMMIT),
            Some(Point::PRODUCER_BEFORE_COMMIT),
            None,
            one_of(&PRODUCER_POINTS),
        ],
        Role::Accounting | Role::Points => vec![
            Some(Point::CONSUMER_AFTER_COMMIT),
            None,
            one_of(&CONSUMER_POINTS),
        ],
    }
}

/// The how-manieth passing of a point ends a life that lasts at most for `slot` orders: small
/// enough that it comes to it.
fn nth(chance: &mut StdRng, point: Point, slot: u64) -> u64 {
    let passings = match point {
        // Once per payment.
        Point::PRODUCER_PREPARED
        | Point::PRODUCER_FENCED
        | Point::PRODUCER_BEFORE_COMMIT
        | Point::PRODUCER_AFTER_COMMIT
        | Point::PRODUCER_AFTER_CONFIRM => slot / 2,
        // Only when a payment is refused or a confirm was lost.
        Point::PRODUCER_ROLLED_BACK
        | Point::PRODUCER_ROLLBACK_FENCED
        | Point::PRODUCER_CHECK_BEFORE_COMMIT
        | Point::PRODUCER_CHECK_AFTER_COMMIT => slot / 100,
        // Once per batch, and a batch may be large.
        _ => (slot / 25).min(12),
    };
    chance.random_range(1..=passings.max(1))
}

#[cfg(test)]
mod tests {
    use super::super::Plan;
    use super::*;

    #[test]
    fn at_the_default_size_each_process_dies_at_least_twice_in_both_ways() {
        for seed in 0..200 {
            let plan = Plan::draw(seed, 1_000, false);
            for role in Role::ALL {
                let lives = plan.lives(role);
                assert!(lives.len() >= 2, "{role} of seed {seed}");
                assert!(lives.iter().any(|life| life.death == Death::Kill));
                assert!(lives.iter().any(|life| life.death != Death::Kill));
                let moments: Vec<_> = lives.iter().filter_map(|life| life.at).collect();
                assert!(moments.is_sorted(), "{role} of seed {seed}: {moments:?}");
                assert!(moments.iter().all(|at| (100..=1_000).contains(at)));
            }
        }
    }

    #[test]
    fn the_promised_deaths_are_in_every_plan_of_some_size() {
        for (seed, payments) in (0..200).flat_map(|seed| [(seed, 50), (seed, 1_000)]) {
            let plan = Plan::draw(seed, payments, false);
            let dies_at = |role, wanted| {
                plan.lives(role)
                    .iter()
                    .any(|life| matches!(life.death, Death::Abort { point, .. } if point == wanted))
            };
            assert!(dies_at(Role::Payment, Point::PRODUCER_AFTER_COMMIT));
            assert!(dies_at(Role::Payment, Point::PRODUCER_BEFORE_COMMIT));
            assert!(dies_at(Role::Accounting, Point::CONSUMER_AFTER_COMMIT));
            assert!(dies_at(Role::Points, Point::CONSUMER_AFTER_COMMIT));
        }
    }

    #[test]
    fn even_one_payment_has_a_death_of_each_process() {
        let plan = Plan::draw(1, 1, false);
        assert_eq!((plan.orders.len(), plan.too_much()), (1, 0));
        for role in Role::ALL {
            let lives = plan.lives(role);
            assert_eq!(lives.len(), 1);
            assert_eq!(lives[0].at, None, "an abort is waited for");
            assert!(matches!(lives[0].death, Death::Abort { nth: 1, .. }));
        }
    }
}
