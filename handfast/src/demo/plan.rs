//! What a run is going to do: the orders, who asks for them when, and who dies how.
//!
//! Pure: the same seed and the same number of payments give the same plan.

use std::fmt;

use handfast_fail_points::Point;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// The most payments of one run.
pub(crate) const MAX_PAYMENTS: u64 = 1_000_000;

const MERCHANTS: u32 = 5;
const USERS: u32 = 20;
const POOR_USERS: u32 = 3;
/// What a poor user has; less than every amount.
const POOR_BALANCE: i64 = 50;
const MIN_AMOUNT: i64 = 100;
const MAX_AMOUNT: i64 = 20_000;
/// Of a hundred orders, so many are more than their user has.
const REFUSED_PERCENT: usize = 5;
/// Of a hundred orders, so many are asked for twice at the same time, and as many again later.
const REPEATED_PERCENT: usize = 5;
/// How many other requests lie between an order's first request and its later repetition.
const LATER_BY: usize = 60;

/// One of the four processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The message service.
    Service,
    /// The producer.
    Payment,
    /// The consumer that writes vouchers.
    Accounting,
    /// The consumer that grants points.
    Points,
}

impl Role {
    /// Every process, in the order in which they are started.
    pub(crate) const ALL: [Self; 4] =
        [Self::Service, Self::Payment, Self::Accounting, Self::Points];

    /// Its name in tables, files and command lines.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Payment => "payment",
            Self::Accounting => "accounting",
            Self::Points => "points",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One order of a merchant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    number: u32,
    merchant: u32,
    user: User,
    /// In minor units.
    pub(crate) amount: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// Has exactly what all of their orders cost.
    Rich(u32),
    /// Has less than any order costs.
    Poor(u32),
}

impl Order {
    /// The merchant, who is credited.
    pub(crate) fn caller(&self) -> String {
        merchant(self.merchant)
    }

    /// The merchant's name for the order.
    pub(crate) fn order_id(&self) -> String {
        format!("order-{:06}", self.number)
    }

    /// Who pays.
    pub(crate) fn user(&self) -> String {
        self.user.name()
    }

    /// True if the user has too little, so that the payment has to be refused.
    pub(crate) fn is_too_much(&self) -> bool {
        matches!(self.user, User::Poor(_))
    }
}

impl User {
    fn name(self) -> String {
        match self {
            Self::Rich(number) => format!("user-{:02}", number + 1),
            Self::Poor(number) => format!("poor-{:02}", number + 1),
        }
    }
}

fn merchant(number: u32) -> String {
    format!("shop-{}", number + 1)
}

/// A request that the merchant sends until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Which of [`Plan::orders`].
    pub(crate) order: usize,
    /// How it is sent.
    pub(crate) kind: RequestKind,
}

/// How a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    /// Once, for the first time.
    First,
    /// Twice at the same time, for the first time.
    FirstTwice,
    /// Once more, for an order that was asked for before.
    Again,
}

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

/// Everything that is decided before the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What it was made from.
    pub(crate) seed: u64,
    /// All of them are different.
    pub(crate) orders: Vec<Order>,
    /// In the order in which they are sent.
    pub(crate) requests: Vec<Request>,
    /// The lives that end in a death, per process in the order of [`Role::ALL`].
    lives: [Vec<Life>; 4],
}

impl Plan {
    /// Draws a plan.
    pub(crate) fn draw(seed: u64, payments: u64) -> Self {
        let mut chance = StdRng::seed_from_u64(seed);
        let payments = payments.clamp(1, MAX_PAYMENTS) as usize;
        let orders = orders(&mut chance, payments);
        let requests = requests(&mut chance, payments);
        let lives = Role::ALL.map(|role| lives(&mut chance, role, payments as u64));
        Self {
            seed,
            orders,
            requests,
            lives,
        }
    }

    /// The lives of a process that end in a death.
    pub(crate) fn lives(&self, role: Role) -> &[Life] {
        &self.lives[role as usize]
    }

    /// The accounts that payment needs, with what is in them at the start.
    pub(crate) fn opening_balances(&self) -> Vec<(String, i64)> {
        self.balances(|_| 0, |user| self.cost_of(user))
    }

    /// The same accounts, with what has to be in them at the end.
    pub(crate) fn closing_balances(&self) -> Vec<(String, i64)> {
        self.balances(|merchant| self.sales_of(merchant), |_| 0)
    }

    fn balances(
        &self,
        of_merchant: impl Fn(u32) -> i64,
        of_rich_user: impl Fn(User) -> i64,
    ) -> Vec<(String, i64)> {
        let merchants = (0..MERCHANTS).map(|number| (merchant(number), of_merchant(number)));
        let users = (0..USERS).map(User::Rich);
        let users = users.map(|user| (user.name(), of_rich_user(user)));
        let poor = (0..POOR_USERS).map(|number| (User::Poor(number).name(), POOR_BALANCE));
        merchants.chain(users).chain(poor).collect()
    }

    fn cost_of(&self, user: User) -> i64 {
        let theirs = self.orders.iter().filter(|order| order.user == user);
        theirs.map(|order| order.amount).sum()
    }

    fn sales_of(&self, merchant: u32) -> i64 {
        let theirs = self.orders.iter();
        theirs
            .filter(|order| order.merchant == merchant && !order.is_too_much())
            .map(|order| order.amount)
            .sum()
    }

    /// How many orders cannot be paid.
    pub(crate) fn too_much(&self) -> usize {
        self.orders
            .iter()
            .filter(|order| order.is_too_much())
            .count()
    }

    /// How many orders are asked for more than once.
    pub(crate) fn repeated(&self) -> usize {
        let repeats = self.requests.iter();
        repeats
            .filter(|request| request.kind != RequestKind::First)
            .count()
    }
}

fn orders(chance: &mut StdRng, payments: usize) -> Vec<Order> {
    let mut too_much = vec![false; payments];
    let refused = (payments * REFUSED_PERCENT + 50) / 100;
    too_much[..refused].fill(true);
    too_much.shuffle(chance);
    (1u32..)
        .zip(too_much)
        .map(|(number, too_much)| Order {
            number,
            merchant: chance.random_range(0..MERCHANTS),
            user: if too_much {
                User::Poor(chance.random_range(0..POOR_USERS))
            } else {
                User::Rich(chance.random_range(0..USERS))
            },
            amount: chance.random_range(MIN_AMOUNT..=MAX_AMOUNT),
        })
        .collect()
}

/// Each order once, some twice at the same time, and some again a while later.
fn requests(chance: &mut StdRng, payments: usize) -> Vec<Request> {
    let repeated = (payments * REPEATED_PERCENT).div_ceil(100);
    let mut mixed: Vec<usize> = (0..payments).collect();
    mixed.shuffle(chance);
    let mut twice = vec![false; payments];
    let mut later = vec![false; payments];
    for order in mixed.iter().take(repeated) {
        twice[*order] = true;
    }
    for order in mixed.iter().rev().take(repeated) {
        later[*order] = true;
    }
    let mut requests = Vec::with_capacity(payments + repeated);
    for order in 0..payments + LATER_BY {
        if order < payments {
            let kind = if twice[order] {
                RequestKind::FirstTwice
            } else {
                RequestKind::First
            };
            requests.push(Request { order, kind });
        }
        if let Some(order) = order.checked_sub(LATER_BY)
            && later[order]
        {
            let kind = RequestKind::Again;
            requests.push(Request { order, kind });
        }
    }
    requests
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
fn lives(chance: &mut StdRng, role: Role, payments: u64) -> Vec<Life> {
    let count = DEATHS
        .iter()
        .find(|(from, _)| payments >= *from)
        .map_or(1, |(_, counts)| counts[role as usize]);
    let mut ways = ways(chance, role);
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
fn ways(chance: &mut StdRng, role: Role) -> Vec<Option<Point>> {
    let mut one_of = |points: &[Point]| Some(points[chance.random_range(0..points.len())]);
    match role {
        Role::Service => vec![one_of(&SERVICE_POINTS), None, one_of(&SERVICE_POINTS)],
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
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_plan_and_another_seed_another() {
        for payments in [1, 50, 1_000] {
            assert_eq!(Plan::draw(7, payments), Plan::draw(7, payments));
        }
        assert_ne!(Plan::draw(7, 1_000).lives, Plan::draw(8, 1_000).lives);
    }

    #[test]
    fn at_the_default_size_each_process_dies_at_least_twice_in_both_ways() {
        for seed in 0..200 {
            let plan = Plan::draw(seed, 1_000);
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
            let plan = Plan::draw(seed, payments);
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
        let plan = Plan::draw(1, 1);
        assert_eq!((plan.orders.len(), plan.too_much()), (1, 0));
        for role in Role::ALL {
            let lives = plan.lives(role);
            assert_eq!(lives.len(), 1);
            assert_eq!(lives[0].at, None, "an abort is waited for");
            assert!(matches!(lives[0].death, Death::Abort { nth: 1, .. }));
        }
    }

    #[test]
    fn every_order_is_asked_for_first_once_and_again_only_later() {
        let plan = Plan::draw(3, 1_000);
        let mut asked = HashSet::new();
        for request in &plan.requests {
            let is_new = asked.insert(request.order);
            assert_eq!(is_new, request.kind != RequestKind::Again);
        }
        assert_eq!(asked.len(), 1_000);
        assert_eq!(plan.too_much(), 50);
        assert_eq!(plan.repeated(), 100);
    }

    #[test]
    fn no_money_appears_or_goes_away() {
        let plan = Plan::draw(3, 500);
        let sum = |balances: Vec<(String, i64)>| balances.iter().map(|(_, b)| b).sum::<i64>();
        assert_eq!(sum(plan.opening_balances()), sum(plan.closing_balances()));
        assert!(MIN_AMOUNT > POOR_BALANCE);
    }
}
