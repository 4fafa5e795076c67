//! Whether it adds up: the five zeros, the equations, and what the merchants were told.

use std::collections::HashMap;

use super::audit::{Books, MAX_NAMED, Numbers};
use super::load::Answers;
use super::plan::Plan;

/// What was found.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    /// Read from the databases.
    pub(crate) numbers: Numbers,
    /// What is wrong, one line each; empty if everything adds up.
    pub(crate) complaints: Vec<String>,
}

impl Verdict {
    /// Reads the databases while nobody writes.
    pub(crate) async fn reach(
        books: &mut Books,
        plan: &Plan,
        answers: &Answers,
    ) -> Result<Self, sqlx::Error> {
        let numbers = books.numbers().await?;
        let mut complaints = books.named().await?;
        complaints.extend(numbers.broken_equations());
        let conflicts = books.conflicts().await?;
        if conflicts > 0 {
            complaints.push(format!(
                "conflict: {conflicts} messages are marked CONFLICT"
            ));
        }
        complaints.extend(wrong_balances(plan, books.balances().await?));
        complaints.extend(wrong_answers(plan, answers));
        Ok(Self {
            numbers,
            complaints,
        })
    }
}

impl Numbers {
    /// The five that have to be zero.
    pub(crate) fn zeros(&self) -> [(&'static str, i64); 5] {
        [
            ("lost", self.lost),
            ("phantom", self.phantom),
            ("doubled", self.doubled),
            ("unbalanced", self.unbalanced),
            ("unfinished", self.unfinished),
        ]
    }

    /// What has to hold and does not.
    fn broken_equations(&self) -> Vec<String> {
        let confirmed = self.confirmed_by_producer + self.confirmed_by_check;
        let cancelled = self.cancelled_by_producer + self.cancelled_by_check;
        let zeros = self.zeros().map(|(name, value)| (name, value, "zero", 0));
        let equations = [
            (
                "attempted",
                self.attempted,
                "committed + rolled_back",
                self.committed + self.rolled_back,
            ),
            (
                "prepared",
                self.prepared,
                "confirmed + cancelled",
                confirmed + cancelled,
            ),
            ("committed", self.committed, "confirmed", confirmed),
            (
                "committed",
                self.committed,
                "accounting_effects",
                self.accounting_effects,
            ),
            (
                "committed",
                self.committed,
                "points_effects",
                self.points_effects,
            ),
            (
                "deliveries",
                self.deliveries,
                "effects + duplicates_absorbed",
                self.accounting_effects + self.points_effects + self.duplicates_absorbed,
            ),
        ];
        zeros
            .into_iter()
            .chain(equations)
            .filter(|(_, left, _, right)| left != right)
            .map(|(left, is, right, wanted)| format!("{left} is {is}, not {right} ({wanted})"))
            .collect()
    }
}

/// Every user has at the start what their orders cost, so money that was taken twice, or
/// given back, or made, is seen here.
fn wrong_balances(plan: &Plan, found: Vec<(String, i64)>) -> Vec<String> {
    let found: HashMap<String, i64> = found.into_iter().collect();
    let wanted = plan.closing_balances().into_iter();
    wanted
        .filter_map(|(name, wanted)| {
            let is = found.get(&name).copied();
            (is != Some(wanted)).then(|| match is {
                Some(is) => format!("balance: {name} has {is}, not {wanted}"),
                None => format!("balance: {name} has no account"),
            })
        })
        .collect()
}

fn wrong_answers(plan: &Plan, answers: &Answers) -> Vec<String> {
    let orders = plan.orders.iter().enumerate();
    orders
        .filter_map(|(index, order)| {
            let complaint = answers.complaint(index, order)?;
            let (caller, order_id) = (order.caller(), order.order_id());
            Some(format!("answer: {caller}/{order_id} {complaint}"))
        })
        .take(MAX_NAMED as usize)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Numbers {
        Numbers {
            attempted: 12,
            committed: 10,
            rolled_back: 2,
            prepared: 12,
            confirmed_by_producer: 9,
            confirmed_by_check: 1,
            cancelled_by_producer: 1,
            cancelled_by_check: 1,
            accounting_effects: 10,
            points_effects: 10,
            deliveries: 23,
            duplicates_absorbed: 3,
            ..Numbers::default()
        }
    }

    #[test]
    fn sound_numbers_break_no_equation() {
        assert_eq!(sound().broken_equations(), Vec::<String>::new());
    }

    #[test]
    fn each_number_that_is_wrong_is_named() {
        type Change = fn(&mut Numbers);
        let changes: [(&str, Change); 9] = [
            ("lost", |n| n.lost += 1),
            ("phantom", |n| n.phantom += 1),
            ("doubled", |n| n.doubled += 1),
            ("unbalanced", |n| n.unbalanced += 1),
            ("unfinished", |n| n.unfinished += 1),
            ("attempted", |n| n.attempted += 1),
            ("prepared", |n| n.cancelled_by_check += 1),
            ("points_effects", |n| n.points_effects += 1),
            ("deliveries", |n| n.deliveries += 1),
        ];
        for (name, change) in changes {
            let mut numbers = sound();
            change(&mut numbers);
            let broken = numbers.broken_equations().join("\n");
            assert!(broken.contains(name), "{name}: {broken}");
        }
    }

    #[test]
    fn money_that_is_missing_is_named() {
        let plan = Plan::draw(1, 20, false);
        let mut found = plan.closing_balances();
        assert!(wrong_balances(&plan, found.clone()).is_empty());
        found[0].1 += 5;
        assert_eq!(wrong_balances(&plan, found).len(), 1);
    }
}
