//! What a run is going to do: the orders, who asks for them when, and ([`deaths`]) who dies how.
//!
//! Pure: the same seed, the same number of payments and the same kind of engines give the same plan.

mod deaths;

use std::fmt;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

pub(crate) use deaths::{Death, Life};

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

/// Everything that is decided before the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What it was made from.
    pub(crate) seed: u64,
    /// All of them are different.
    pub(crate) orders: Vec<Order>,
    /// In the order in which they are sent.
    pub(crate) requests: Vec<Request>,
    /// Servers have other points to die at.
    on_servers: bool,
    /// The lives that end in a death, per process in the order of [`Role::ALL`].
    lives: [Vec<Life>; 4],
}

impl Plan {
    /// Draws a plan.
    pub(crate) fn draw(seed: u64, payments: u64, on_servers: bool) -> Self {
        let mut chance = StdRng::seed_from_u64(seed);
        let payments = payments.clamp(1, MAX_PAYMENTS) as usize;
        let orders = orders(&mut chance, payments);
        let requests = requests(&mut chance, payments);
        let lives =
            Role::ALL.map(|role| deaths::draw(&mut chance, role, payments as u64, on_servers));
        Self {
            seed,
            orders,
            requests,
            on_servers,
            lives,
        }
    }

    /// With which arguments the same plan is drawn again. Which servers they are makes no
    /// difference, so none is named, and no password.
    pub(crate) fn arguments(&self) -> String {
        let servers = match self.on_servers {
            true => " --store postgres://… --broker amqp://…",
            false => "",
        };
        let (payments, seed) = (self.orders.len(), self.seed);
        format!("--payments {payments} --seed {seed}{servers}")
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
    let again = |order: usize| {
        let kind = RequestKind::Again;
        later[order].then_some(Request { order, kind })
    };
    let mut requests = Vec::with_capacity(payments + repeated);
    for (order, twice) in twice.into_iter().enumerate() {
        let kind = if twice {
            RequestKind::FirstTwice
        } else {
            RequestKind::First
        };
        requests.push(Request { order, kind });
        requests.extend(order.checked_sub(LATER_BY).and_then(again));
    }
    // What is to come again at the end has nobody behind it.
    requests.extend((payments.saturating_sub(LATER_BY)..payments).filter_map(again));
    requests
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_plan_and_another_seed_another() {
        for payments in [1, 50, 1_000] {
            assert_eq!(
                Plan::draw(7, payments, false),
                Plan::draw(7, payments, false)
            );
        }
        assert_ne!(
            Plan::draw(7, 1_000, false).lives,
            Plan::draw(8, 1_000, false).lives
        );
    }

    #[test]
    fn all_that_a_plan_is_drawn_from_is_told() {
        let told = Plan::draw(7, 50, false).arguments();
        assert_eq!(told, "--payments 50 --seed 7");
        assert_ne!(Plan::draw(7, 50, true), Plan::draw(7, 50, false));
        let told = Plan::draw(7, 50, true).arguments();
        assert!(told.contains("--store postgres://… --broker amqp://…"));
    }

    #[test]
    fn every_order_is_asked_for_first_once_and_again_only_later() {
        let plan = Plan::draw(3, 1_000, false);
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
        let plan = Plan::draw(3, 500, false);
        let sum = |balances: Vec<(String, i64)>| balances.iter().map(|(_, b)| b).sum::<i64>();
        assert_eq!(sum(plan.opening_balances()), sum(plan.closing_balances()));
        const { assert!(MIN_AMOUNT > POOR_BALANCE) };
    }
}
