//! The statements, written once. What differs between the databases are their clock and how a
//! claim passes over what another is claiming. Each is given up if it is not answered in time;
//! those of the business transaction end with it.

use std::time::Duration;

use handfast_producer::Tx;
use sqlx::{Pool, Postgres, Sqlite};
use tokio::time::timeout;
use uuid::Uuid;

use super::held::{Held, STATEMENT_TIMEOUT};
use super::{Order, Payment, Records, State, Store, Unpaid};

/// `now` is the database's time in microseconds since 1970 UTC.
macro_rules! records {
    ($database:ty, now: $now:literal, skip_locked: $skip_locked:literal) => {
        impl Records for Store<$database> {
            type Database = $database;

            fn writer(&self) -> &Pool<$database> {
                &self.writer
            }

            async fn open_account(&self, name: &str, balance: i64) -> Result<(), sqlx::Error> {
                let open = sqlx::query(
                    "INSERT INTO account (name, balance) VALUES ($1, $2)
                     ON CONFLICT (name) DO NOTHING",
                )
                .bind(name)
                .bind(balance);
                let mut db = Held::of(&self.writer).await?;
                let opened = timeout(STATEMENT_TIMEOUT, open.execute(&mut *db)).await;
                db.answered(opened)?;
                Ok(())
            }

            async fn accept(
                &self,
                order: &Order,
                user: &str,
                amount: i64,
                due_in: Duration,
            ) -> Result<Payment, sqlx::Error> {
                let insert = sqlx::query(concat!(
                    r#"INSERT INTO payment
                           (caller, order_id, "user", amount, state, created_at, updated_at, due_at)
                       SELECT $1, $2, $3, $4, 'PAYING', t.now, t.now, t.now + $5
                         FROM (SELECT "#, $now, r#" AS now) AS t
                        WHERE true
                       ON CONFLICT (caller, order_id) DO NOTHING"#,
                ))
                .bind(&order.caller)
                .bind(&order.order_id)
                .bind(user)
                .bind(amount)
                .bind(micros(due_in));
                let mut db = Held::of(&self.writer).await?;
                let inserted = timeout(STATEMENT_TIMEOUT, insert.execute(&mut *db)).await;
                if db.answered(inserted)?.rows_affected() == 1 {
                    return Ok(Payment {
                        order: order.clone(),
                        user: user.to_owned(),
                        amount,
                        state: State::Paying,
                    });
                }
                self.find(order).await?.ok_or(sqlx::Error::RowNotFound)
            }

            async fn find(&self, order: &Order) -> Result<Option<Payment>, sqlx::Error> {
                let find = sqlx::query_as(
                    r#"SELECT "user", amount, state, reason
                         FROM payment WHERE caller = $1 AND order_id = $2"#,
                )
                .bind(&order.caller)
                .bind(&order.order_id);
                let mut db = Held::of(&self.readers).await?;
                let found = timeout(STATEMENT_TIMEOUT, find.fetch_optional(&mut *db)).await;
                let row: Option<(String, i64, String, Option<String>)> = db.answered(found)?;
                let Some((user, amount, word, reason)) = row else {
                    return Ok(None);
                };
                Ok(Some(Payment {
                    order: order.clone(),
                    user,
                    amount,
                    state: state(&word, reason)?,
                }))
            }

            async fn note_try(&self, try_id: Uuid, order: &Order) -> Result<(), sqlx::Error> {
                let note = sqlx::query(concat!(
                    "INSERT INTO pay_try (try_id, caller, order_id, at)
                     VALUES ($1, $2, $3, ", $now, ")",
                ))
                .bind(try_id)
                .bind(&order.caller)
                .bind(&order.order_id);
                let mut db = Held::of(&self.writer).await?;
                let noted = timeout(STATEMENT_TIMEOUT, note.execute(&mut *db)).await;
                db.answered(noted)?;
                Ok(())
            }

            async fn refuse(&self, order: &Order, reason: &str) -> Result<(), sqlx::Error> {
                let refuse = sqlx::query(concat!(
                    "UPDATE payment SET state = 'REFUSED', reason = $1, updated_at = ", $now,
                    " WHERE caller = $2 AND order_id = $3 AND state = 'PAYING'",
                ))
                .bind(reason)
                .bind(&order.caller)
                .bind(&order.order_id);
                let mut db = Held::of(&self.writer).await?;
                let refused = timeout(STATEMENT_TIMEOUT, refuse.execute(&mut *db)).await;
                db.answered(refused)?;
                Ok(())
            }

            async fn claim_due(
                &self,
                lease: Duration,
                rows: u32,
            ) -> Result<Vec<Order>, sqlx::Error> {
                let claim = sqlx::query_as(concat!(
                    "WITH due AS MATERIALIZED (
                         SELECT caller, order_id FROM payment
                          WHERE state = 'PAYING' AND due_at <= ", $now, "
                          ORDER BY due_at LIMIT $2 ", $skip_locked, ")
                     UPDATE payment SET due_at = ", $now, " + $1
                      WHERE (caller, order_id) IN (SELECT caller, order_id FROM due)
                     RETURNING caller, order_id",
                ))
                .bind(micros(lease))
                .bind(i64::from(rows));
                let mut db = Held::of(&self.writer).await?;
                let claimed = timeout(STATEMENT_TIMEOUT, claim.fetch_all(&mut *db)).await;
                let orders: Vec<(String, String)> = db.answered(claimed)?;
                let orders = orders.into_iter();
                Ok(orders
                    .map(|(caller, order_id)| Order { caller, order_id })
                    .collect())
            }

            async fn has_due(&self) -> Result<bool, sqlx::Error> {
                let ask = sqlx::query_scalar(concat!(
                    "SELECT EXISTS (SELECT 1 FROM payment
                                     WHERE state = 'PAYING' AND due_at <= ", $now, ")",
                ));
                let mut db = Held::of(&self.readers).await?;
                let answer = timeout(STATEMENT_TIMEOUT, ask.fetch_one(&mut *db)).await;
                db.answered(answer)
            }

            async fn pay(
                tx: &mut Tx<$database>,
                try_id: Uuid,
                payment: &Payment,
            ) -> Result<(), Unpaid> {
                let message_id = tx.message_id();
                let db: &mut <$database as sqlx::Database>::Connection = tx;
                let Payment { order, user, amount, .. } = payment;
                let marked = sqlx::query(concat!(
                    "UPDATE payment SET state = 'PAID', message_id = $1, updated_at = ", $now,
                    " WHERE caller = $2 AND order_id = $3 AND state = 'PAYING'",
                ))
                .bind(message_id)
                .bind(&order.caller)
                .bind(&order.order_id)
                .execute(&mut *db)
                .await?;
                if marked.rows_affected() == 0 {
                    return Err(Unpaid::NotPaying);
                }
                sqlx::query(concat!(
                    "INSERT INTO pay_done (try_id, message_id, caller, order_id, at)
                     VALUES ($1, $2, $3, $4, ", $now, ")",
                ))
                .bind(try_id)
                .bind(message_id)
                .bind(&order.caller)
                .bind(&order.order_id)
                .execute(&mut *db)
                .await?;
                // Accounts come last, because a merchant's is everybody's, and in the order of
                // their names, because two who pay each other must not wait for each other.
                let credited_first = order.caller < *user;
                for credits in [credited_first, !credited_first] {
                    if credits {
                        sqlx::query(
                            "INSERT INTO account (name, balance) VALUES ($1, $2)
                             ON CONFLICT (name)
                             DO UPDATE SET balance = account.balance + excluded.balance",
                        )
                        .bind(&order.caller)
                        .bind(amount)
                        .execute(&mut *db)
                        .await?;
                        continue;
                    }
                    let taken = sqlx::query(
                        "UPDATE account SET balance = balance - $1
                          WHERE name = $2 AND balance >= $1",
                    )
                    .bind(amount)
                    .bind(user)
                    .execute(&mut *db)
                    .await?;
                    if taken.rows_affected() == 0 {
                        return Err(Unpaid::InsufficientBalance);
                    }
                }
                Ok(())
            }
        }
    };
}

records!(
    Sqlite,
    now: "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
    skip_locked: ""
);

records!(
    Postgres,
    now: "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
    skip_locked: "FOR UPDATE SKIP LOCKED"
);

/// What the table's word means.
fn state(word: &str, reason: Option<String>) -> Result<State, sqlx::Error> {
    match word {
        "PAYING" => Ok(State::Paying),
        "PAID" => Ok(State::Paid),
        "REFUSED" => Ok(State::Refused(reason.unwrap_or_default())),
        other => {
            let unknown = format!("a payment has the state `{other}`");
            Err(sqlx::Error::Decode(unknown.into()))
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
