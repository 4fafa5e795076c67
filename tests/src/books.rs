//! The promises, as statements about the databases of all parties.
//!
//! Nothing here asks a process: what is read is what is durable.

use std::collections::{BTreeMap, BTreeSet};

use payment::pay::{Completed, TOPIC};
use sha2::{Digest as _, Sha256};

use crate::clients::name_of;
use crate::database::{Database, Read, Row, number, rows};
use crate::world::World;

type Id = Vec<u8>;

/// A struct whose fields are columns of the same names.
macro_rules! row {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$doc:meta])* pub $column:ident: $type:ty,)* }) => {
        $(#[$meta])*
        pub struct $name { $($(#[$doc])* pub $column: $type,)* }

        impl Read for $name {
            fn read(row: Row<'_>) -> Result<Self, sqlx::Error> {
                Ok(Self { $($column: row.get(stringify!($column))?,)* })
            }
        }
    };
}

row! {
    /// A message as the service keeps it.
    #[derive(Clone, Debug)]
    pub struct Message {
        /// Its id.
        pub id: Id,
        /// Its topic.
        pub topic: String,
        /// `PREPARED`, `CONFIRMED` or `CANCELLED`.
        pub state: String,
        /// `PRODUCER` or `CHECK`, once decided.
        pub decided_by: Option<String>,
        /// Of what was prepared.
        pub content_hash: Vec<u8>,
        /// Answered checks.
        pub checks: i64,
        /// Decided both ways: evidence of a fault.
        pub conflict: bool,
        /// When it was stored.
        pub prepared_at: i64,
        /// When it was decided.
        pub decided_at: Option<i64>,
    }
}

row! {
    /// A delivery as the service keeps it.
    #[derive(Clone, Debug)]
    pub struct Delivery {
        /// Its message.
        pub message_id: Id,
        /// Its subscription.
        pub subscription: String,
        /// `PENDING`, `SENT`, `CONSUMED`, `DEAD` or `SKIPPED`.
        pub state: String,
        /// Counted failures.
        pub attempts: i64,
        /// Number of the last send.
        pub generation: i64,
        /// When its message was confirmed.
        pub confirmed_at: i64,
        /// When it was first sent.
        pub first_sent_at: Option<i64>,
        /// When it was last sent.
        pub sent_at: Option<i64>,
        /// When it ended.
        pub answered_at: Option<i64>,
        /// Why it is DEAD, or failed last.
        pub last_error: Option<String>,
    }
}

row! {
    /// A business transaction of payment that committed.
    #[derive(Clone, Debug)]
    pub struct Done {
        /// The message that tells of it.
        pub message_id: Id,
        /// The order it paid.
        pub order_id: String,
        /// When it was written.
        pub at: i64,
    }
}

row! {
    /// A voucher or a grant.
    #[derive(Clone, Debug)]
    pub struct Effect {
        /// The message that caused it.
        pub message_id: Id,
        /// The merchant.
        pub caller: String,
        /// The order.
        pub order_id: String,
        /// Who paid.
        pub user: String,
        /// How much in minor units, or how many points.
        pub amount: i64,
        /// When it was written.
        pub at: i64,
    }
}

row! {
    /// A row of a payment.
    #[derive(Clone, Debug)]
    pub struct Payment {
        /// The order.
        pub order_id: String,
        /// `PAYING`, `PAID` or `REFUSED`.
        pub state: String,
        /// In minor units.
        pub amount: i64,
    }
}

/// Everything that the databases of a world say at one moment.
#[derive(Clone, Debug, Default)]
pub struct Books {
    /// The service's messages.
    pub messages: Vec<Message>,
    /// The service's deliveries.
    pub deliveries: Vec<Delivery>,
    /// Payment's requests.
    pub payments: Vec<Payment>,
    /// How many tries payment began.
    pub tries: i64,
    /// Payment's committed transactions.
    pub done: Vec<Done>,
    /// Payment's fence: id and verdict.
    pub fence: BTreeMap<Id, String>,
    /// The sum of all balances.
    pub money: i64,
    /// What the accounts were opened with.
    pub opened: i64,
    /// Accounting's vouchers.
    pub vouchers: Vec<Effect>,
    /// Vouchers whose lines do not sum to zero, or are not two.
    pub unbalanced: i64,
    /// Points' grants.
    pub grants: Vec<Effect>,
    /// How often accounting has seen which message.
    pub seen_by_accounting: BTreeMap<Id, i64>,
    /// How often points has.
    pub seen_by_points: BTreeMap<Id, i64>,
    /// The test made the service forget what was finished, so absence proves nothing.
    pub forgetful: bool,
}

/// What a run must have seen at least, or it proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Floor {
    /// Orders that were paid.
    pub paid: usize,
    /// Orders that were refused.
    pub refused: usize,
    /// Messages that a check confirmed.
    pub confirmed_by_check: usize,
    /// Messages that a check cancelled.
    pub cancelled_by_check: usize,
    /// Repeats that an inbox absorbed.
    pub repeats: usize,
}

impl Books {
    /// Reads the four databases, whichever of them exist.
    pub async fn read(world: &World) -> Self {
        let mut books = Self {
            opened: world.opened,
            ..Self::default()
        };
        if let Some(db) = made(world, "payment", "account").await {
            books.read_payment(&db).await;
            db.close().await;
        }
        if let Some(db) = made(world, "service", "message").await {
            books.read_service(&db).await;
            db.close().await;
        }
        if let Some(db) = made(world, "accounting", "voucher").await {
            books.vouchers = rows(
                &db,
                "SELECT message_id, caller, order_id, \"user\", amount, at FROM voucher",
            )
            .await;
            books.unbalanced = number(
                &db,
                "SELECT count(*) FROM voucher v
                  WHERE (SELECT coalesce(sum(amount), 0) <> 0 OR count(*) <> 2
                           FROM voucher_line l WHERE l.voucher = v.id)",
            )
            .await;
            books.seen_by_accounting = seen(&db).await;
            db.close().await;
        }
        if let Some(db) = made(world, "points", "point_grant").await {
            books.grants = rows(
                &db,
                "SELECT message_id, caller, order_id, \"user\", points AS amount, at
                   FROM point_grant",
            )
            .await;
            books.seen_by_points = seen(&db).await;
            db.close().await;
        }
        books
    }

    async fn read_service(&mut self, db: &Database) {
        self.messages = rows(
            db,
            "SELECT id, topic, state, decided_by, content_hash, checks, conflict,
                    prepared_at, decided_at FROM message ORDER BY id",
        )
        .await;
        self.deliveries = rows(
            db,
            "SELECT message_id, subscription, state, attempts, generation, confirmed_at,
                    first_sent_at, sent_at, answered_at, last_error
               FROM delivery ORDER BY message_id, subscription",
        )
        .await;
    }

    async fn read_payment(&mut self, db: &Database) {
        self.payments = rows(db, "SELECT order_id, state, amount FROM payment").await;
        self.tries = number(db, "SELECT count(*) FROM pay_try").await;
        self.done = rows(db, "SELECT message_id, order_id, at FROM pay_done").await;
        let fence: Vec<(Id, String)> =
            rows(db, "SELECT message_id, verdict FROM handfast_fence").await;
        self.fence = fence.into_iter().collect();
        let money = "SELECT CAST(coalesce(sum(balance), 0) AS bigint) FROM account";
        self.money = number(db, money).await;
    }

    /// What is still on its way, if anything is.
    pub fn unfinished(&self) -> Option<String> {
        let paying = self.payments.iter().filter(|p| p.state == "PAYING").count();
        let prepared = self
            .messages
            .iter()
            .filter(|m| m.state == "PREPARED")
            .count();
        let open = |subscription: &str| {
            self.deliveries
                .iter()
                .filter(|d| d.subscription == subscription)
                .filter(|d| d.state == "PENDING" || d.state == "SENT")
                .count()
        };
        let subscriptions: BTreeSet<_> = self.deliveries.iter().map(|d| &d.subscription).collect();
        let open: BTreeMap<_, _> = subscriptions
            .into_iter()
            .map(|name| (name, open(name)))
            .filter(|(_, open)| *open > 0)
            .collect();
        let idle = paying == 0 && prepared == 0 && open.is_empty();
        (!idle)
            .then(|| format!("{paying} payments PAYING, {prepared} PREPARED, open by now {open:?}"))
    }

    /// Messages in this state that were decided by this one.
    pub fn decided(&self, state: &str, by: &str) -> usize {
        self.messages
            .iter()
            .filter(|m| m.state == state && m.decided_by.as_deref() == Some(by))
            .count()
    }

    /// How often a subscription has seen messages, and how many different ones.
    pub fn copies(seen: &BTreeMap<Id, i64>) -> (i64, usize) {
        (seen.values().sum(), seen.len())
    }

    /// Every promise, for a world in which nothing is on its way any more and no consumer
    /// gave anything up; and that the run was about something.
    pub fn hold(&self, floor: Floor) {
        assert_eq!(self.unfinished(), None, "something is still on its way");
        self.one_decision();
        self.nothing_lost();
        self.nothing_invented();
        self.one_effect();
        self.fence_keeps_its_word();
        self.what_was_prepared_is_what_was_seen();
        self.was_about(floor);
    }

    /// I4: no message is decided twice, and its times are in the order of its life.
    pub fn one_decision(&self) {
        let by_id: BTreeMap<_, _> = self.messages.iter().map(|m| (&m.id, m)).collect();
        for message in &self.messages {
            let name = name_of(&message.id);
            assert!(!message.conflict, "{name} was decided both ways");
            match (message.state.as_str(), message.decided_at) {
                ("PREPARED", None) => {}
                ("CONFIRMED" | "CANCELLED", Some(at)) => {
                    assert!(at >= message.prepared_at, "{name} was decided too early");
                }
                other => panic!("{name} is {other:?}"),
            }
        }
        for delivery in &self.deliveries {
            let name = name_of(&delivery.message_id);
            let message = by_id[&delivery.message_id];
            assert_eq!(message.state, "CONFIRMED", "{name} has a delivery");
            let path = [
                message.decided_at,
                Some(delivery.confirmed_at),
                delivery.first_sent_at,
                delivery.sent_at,
            ];
            let path: Vec<_> = path.into_iter().flatten().collect();
            assert!(path.is_sorted(), "{name} went back in time: {delivery:?}");
            let finished = ["CONSUMED", "DEAD", "SKIPPED"].contains(&delivery.state.as_str());
            assert_eq!(finished, delivery.answered_at.is_some(), "{delivery:?}");
            if delivery.state == "CONSUMED" {
                assert!(delivery.generation >= 1, "{name} was consumed, never sent");
            }
        }
    }

    /// I1: what committed has its voucher and its grant, and its deliveries are CONSUMED.
    pub fn nothing_lost(&self) {
        let vouchers = counted(&self.vouchers);
        let grants = counted(&self.grants);
        let confirmed: BTreeSet<_> = self
            .messages
            .iter()
            .filter(|m| m.state == "CONFIRMED" && m.topic == TOPIC)
            .map(|m| &m.id)
            .collect();
        for done in &self.done {
            let name = name_of(&done.message_id);
            let id = &done.message_id;
            assert!(
                vouchers.contains_key(id),
                "{name} ({}): no voucher",
                done.order_id
            );
            assert!(
                grants.contains_key(id),
                "{name} ({}): no grant",
                done.order_id
            );
            let known = confirmed.contains(id) || self.forgetful;
            assert!(known, "{name} is not CONFIRMED");
        }
        for delivery in &self.deliveries {
            if confirmed.contains(&delivery.message_id) {
                assert_eq!(delivery.state, "CONSUMED", "{delivery:?}");
            }
        }
        for (order, state) in self.payments.iter().map(|p| (&p.order_id, &p.state)) {
            let paid = self.done.iter().any(|done| done.order_id == *order);
            assert_eq!(state == "PAID", paid, "order {order} is {state}");
        }
    }

    /// I2: what did not commit was seen by nobody, and nobody saw anything before its commit.
    pub fn nothing_invented(&self) {
        let done: BTreeMap<_, _> = self.done.iter().map(|d| (&d.message_id, d.at)).collect();
        for effect in self.vouchers.iter().chain(&self.grants) {
            let name = name_of(&effect.message_id);
            let committed = done.get(&effect.message_id);
            let committed = committed.unwrap_or_else(|| panic!("{name} was never committed"));
            assert!(effect.at >= *committed, "{name} was seen before its commit");
        }
        for id in self
            .seen_by_accounting
            .keys()
            .chain(self.seen_by_points.keys())
        {
            assert!(done.contains_key(id), "{} was never committed", name_of(id));
        }
        for message in self.messages.iter().filter(|m| m.topic == TOPIC) {
            let committed = done.contains_key(&message.id);
            let confirmed = message.state == "CONFIRMED";
            assert_eq!(committed, confirmed, "{message:?}");
        }
    }

    /// I3: one voucher and one grant per message, one deduction per order, and money is only
    /// moved.
    pub fn one_effect(&self) {
        for (party, effects) in [("voucher", &self.vouchers), ("grant", &self.grants)] {
            for (id, count) in counted(effects) {
                assert_eq!(count, 1, "{}: {count} times a {party}", name_of(id));
            }
        }
        let mut orders = BTreeSet::new();
        for done in &self.done {
            let new = orders.insert(&done.order_id);
            assert!(new, "order {} was paid twice", done.order_id);
        }
        assert_eq!(self.unbalanced, 0, "vouchers that do not balance");
        assert_eq!(self.money, self.opened, "money was made or lost");
    }

    /// I5: what the fence calls ROLLED_BACK never committed, what it calls COMMITTED did.
    pub fn fence_keeps_its_word(&self) {
        let done: BTreeSet<_> = self.done.iter().map(|d| &d.message_id).collect();
        for (id, verdict) in &self.fence {
            let committed = done.contains(id);
            assert_eq!(verdict == "COMMITTED", committed, "{}", name_of(id));
        }
        for id in done {
            assert!(self.fence.contains_key(id), "{} has no fence", name_of(id));
        }
    }

    /// I9: what accounting wrote down is, to the byte, what was prepared.
    pub fn what_was_prepared_is_what_was_seen(&self) {
        let prepared: BTreeMap<_, _> = self
            .messages
            .iter()
            .map(|m| (&m.id, &m.content_hash))
            .collect();
        for voucher in &self.vouchers {
            // What was finished long ago may be gone from the service.
            if let Some(hash) = prepared.get(&voucher.message_id) {
                let name = name_of(&voucher.message_id);
                assert_eq!(
                    **hash,
                    content_hash(voucher),
                    "{name} was changed on its way"
                );
            }
        }
    }

    fn was_about(&self, floor: Floor) {
        let refused = self.payments.iter().filter(|p| p.state == "REFUSED");
        let numbers = [
            ("paid", self.done.len(), floor.paid),
            ("refused", refused.count(), floor.refused),
            (
                "confirmed by a check",
                self.decided("CONFIRMED", "CHECK"),
                floor.confirmed_by_check,
            ),
            (
                "cancelled by a check",
                self.decided("CANCELLED", "CHECK"),
                floor.cancelled_by_check,
            ),
            (
                "repeats",
                usize::try_from(self.repeats()).expect("a count"),
                floor.repeats,
            ),
        ];
        for (what, found, least) in numbers {
            assert!(found >= least, "{found} {what}, at least {least} expected");
        }
    }

    /// Copies that an inbox absorbed.
    pub fn repeats(&self) -> i64 {
        [&self.seen_by_accounting, &self.seen_by_points]
            .into_iter()
            .flat_map(BTreeMap::values)
            .map(|seen| seen - 1)
            .sum()
    }
}

fn counted(effects: &[Effect]) -> BTreeMap<&Id, usize> {
    let mut counted = BTreeMap::new();
    for effect in effects {
        *counted.entry(&effect.message_id).or_default() += 1;
    }
    counted
}

/// The content hash of the contract, made again from what a consumer has written down.
fn content_hash(seen: &Effect) -> Vec<u8> {
    let payload = serde_json::to_vec(&Completed {
        caller: &seen.caller,
        order_id: &seen.order_id,
        user: &seen.user,
        amount: seen.amount,
    })
    .expect("plain fields become JSON");
    let key = format!("{}/{}", seen.caller, seen.order_id);
    let mut hash = Sha256::new();
    for part in [
        TOPIC.as_bytes(),
        b"key",
        key.as_bytes(),
        b"application/json",
        &payload,
    ] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().to_vec()
}

/// The database of a party, if it is there with this table.
async fn made(world: &World, name: &str, table: &str) -> Option<Database> {
    let database = world.database_if_any(name).await?;
    let made = database.has(table).await;
    if !made {
        database.close().await;
        return None;
    }
    Some(database)
}

async fn seen(db: &Database) -> BTreeMap<Id, i64> {
    if !db.has("handfast_inbox").await {
        return BTreeMap::new();
    }
    let rows: Vec<(Id, i64)> = rows(db, "SELECT message_id, seen FROM handfast_inbox").await;
    rows.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    fn effect(message_id: &Id) -> Effect {
        Effect {
            message_id: message_id.clone(),
            caller: "shop".to_owned(),
            order_id: "1".to_owned(),
            user: "ada".to_owned(),
            amount: 250,
            at: 30,
        }
    }

    fn message(id: &Id, state: &str) -> Message {
        Message {
            id: id.clone(),
            topic: TOPIC.to_owned(),
            state: state.to_owned(),
            decided_by: Some("PRODUCER".to_owned()),
            content_hash: content_hash(&effect(id)),
            checks: 0,
            conflict: false,
            prepared_at: 10,
            decided_at: Some(25),
        }
    }

    fn delivery(id: &Id, subscription: &str) -> Delivery {
        Delivery {
            message_id: id.clone(),
            subscription: subscription.to_owned(),
            state: "CONSUMED".to_owned(),
            attempts: 0,
            generation: 1,
            confirmed_at: 25,
            first_sent_at: Some(26),
            sent_at: Some(26),
            answered_at: Some(31),
            last_error: None,
        }
    }

    /// One payment that came right, and one try that was rolled back.
    fn sound() -> Books {
        let (paid, refused) = (vec![1; 16], vec![2; 16]);
        Books {
            messages: vec![message(&paid, "CONFIRMED"), message(&refused, "CANCELLED")],
            deliveries: vec![delivery(&paid, "accounting"), delivery(&paid, "points")],
            payments: vec![Payment {
                order_id: "1".to_owned(),
                state: "PAID".to_owned(),
                amount: 250,
            }],
            tries: 2,
            done: vec![Done {
                message_id: paid.clone(),
                order_id: "1".to_owned(),
                at: 20,
            }],
            fence: BTreeMap::from([
                (paid.clone(), "COMMITTED".to_owned()),
                (refused, "ROLLED_BACK".to_owned()),
            ]),
            money: 5,
            opened: 5,
            vouchers: vec![effect(&paid)],
            grants: vec![effect(&paid)],
            seen_by_accounting: BTreeMap::from([(paid.clone(), 2)]),
            seen_by_points: BTreeMap::from([(paid, 1)]),
            ..Books::default()
        }
    }

    const FLOOR: Floor = Floor {
        paid: 1,
        refused: 0,
        confirmed_by_check: 0,
        cancelled_by_check: 0,
        repeats: 1,
    };

    #[test]
    fn a_sound_world_holds() {
        sound().hold(FLOOR);
    }

    #[test]
    fn every_broken_promise_is_found() {
        type Break = fn(&mut Books);
        let breaks: [(&str, Break); 19] = [
            ("no voucher", |b| b.vouchers.clear()),
            ("no grant", |b| b.grants.clear()),
            ("never delivered", |b| {
                b.deliveries[0].state = "DEAD".to_owned();
            }),
            ("still open", |b| b.deliveries[0].state = "SENT".to_owned()),
            ("undecided", |b| b.messages[0].state = "PREPARED".to_owned()),
            ("invented", |b| b.done.clear()),
            ("seen without commit", |b| {
                b.seen_by_points.insert(vec![2; 16], 1);
            }),
            ("seen too early", |b| b.vouchers[0].at = 19),
            ("booked twice", |b| b.vouchers.push(b.vouchers[0].clone())),
            ("rewarded twice", |b| b.grants.push(b.grants[0].clone())),
            ("paid twice", |b| b.done.push(b.done[0].clone())),
            ("unbalanced", |b| b.unbalanced = 1),
            ("money made", |b| b.money += 1),
            ("decided both ways", |b| b.messages[0].conflict = true),
            ("delivered though cancelled", |b| {
                b.messages[0].state = "CANCELLED".to_owned();
            }),
            ("sent before it was confirmed", |b| {
                b.deliveries[0].first_sent_at = Some(24);
            }),
            ("a verdict that was not kept", |b| {
                b.fence.insert(vec![1; 16], "ROLLED_BACK".to_owned());
            }),
            ("changed on its way", |b| b.vouchers[0].amount = 249),
            ("nothing was absorbed", |b| {
                b.seen_by_accounting.insert(vec![1; 16], 1);
            }),
        ];
        for (what, wrong) in breaks {
            let mut books = sound();
            wrong(&mut books);
            assert!(catch_unwind(|| books.hold(FLOOR)).is_err(), "{what}");
        }
    }
}
