//! One grant per payment, and with it the user's balance.

mod postgres;
mod sqlite;

use std::future::Future;
use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, InboxDatabase, Tx};
use sqlx::error::DatabaseError;

use crate::payment::Payment;

/// How many minor units are worth one point.
const MINOR_UNITS_PER_POINT: i64 = 100;
/// How long a message waits that met a database which could not write.
const DATABASE_LATER: Duration = Duration::from_secs(5);

/// The grant, which changes the balance.
const GRANT: &str = r#"
    INSERT INTO point_grant (message_id, "user", caller, order_id, points)
    VALUES ($1, $2, $3, $4, $5)
"#;

/// A database that grants can be kept in.
pub trait Grants: InboxDatabase {
    /// Writes one grant.
    fn grant(
        tx: &mut Tx<Self>,
        message: &Delivered,
        payment: &Payment,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

/// The handler of `payment.completed`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Points;

impl<D: Grants> BatchHandler<D> for Points {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut payments = Vec::with_capacity(messages.len());
        let mut answers = vec![Answer::Consumed; messages.len()];
        for (index, message) in messages.iter().enumerate() {
            match Payment::read(&message.payload) {
                Ok(payment) => payments.push((index, payment)),
                Err(unreadable) => answers[index] = Answer::rejected(unreadable),
            }
        }
        // Two transactions that lock balances in one order wait for each other at most once.
        payments.sort_by(|(_, one), (_, other)| one.user.cmp(&other.user));
        for (index, payment) in payments {
            if let Err(error) = D::grant(tx, &messages[index], &payment).await {
                // Nothing of the batch stays now, and each message gets its turn alone.
                answers[index] = word_on::<D>(&error);
                break;
            }
        }
        answers
    }
}

/// One point per 100 minor units, rounded down: splitting a payment never yields more.
fn points(payment: &Payment) -> i64 {
    payment.amount / MINOR_UNITS_PER_POINT
}

/// A rule of the schema that refuses is the message's failure. A full or failing disk is not:
/// it must not use up the attempts of every message that comes by.
fn word_on<D: Grants>(error: &sqlx::Error) -> Answer {
    let code = error.as_database_error().and_then(DatabaseError::code);
    match code {
        Some(code) if D::is_about_data(&code) => Answer::failed(error),
        _ => Answer::Later(DATABASE_LATER),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sqlx::{Connection as _, Sqlite, SqliteConnection};
    use uuid::Uuid;

    use super::*;
    use crate::database::sqlite::SCHEMA;

    async fn database() -> SqliteConnection {
        let mut db = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        // Applied at every start, so it is applied twice.
        sqlx::raw_sql(SCHEMA).execute(&mut db).await.unwrap();
        sqlx::raw_sql(SCHEMA).execute(&mut db).await.unwrap();
        db
    }

    pub(crate) fn paid(number: u128, user: &str, amount: i64) -> Delivered {
        let payload = format!(
            r#"{{"caller":"shop","order_id":"{number}","user":"{user}","amount":{amount}}}"#
        );
        Delivered {
            message_id: Uuid::from_u128(number),
            subscription: "points".to_owned(),
            topic: "payment.completed".to_owned(),
            producer: "payment".to_owned(),
            key: None,
            content_type: "application/json".to_owned(),
            headers: Vec::new(),
            payload: payload.into(),
            generation: 1,
            sent_at: 0,
            first_sent_at: 0,
            alone: false,
        }
    }

    #[tokio::test]
    async fn a_balance_is_the_sum_of_its_grants() {
        let mut db = database().await;
        let batch = [
            paid(1, "ada", 1_999),
            paid(2, "bob", 100),
            paid(3, "ada", 250),
            paid(4, "ada", 99),
        ];
        let answers = BatchHandler::<Sqlite>::handle_batch(&Points, &mut db, &batch).await;
        assert_eq!(answers, vec![Answer::Consumed; 4]);
        let balances: Vec<(String, i64)> =
            sqlx::query_as("SELECT user, points FROM balance ORDER BY user")
                .fetch_all(&mut db)
                .await
                .unwrap();
        assert_eq!(balances, [("ada".to_owned(), 21), ("bob".to_owned(), 1)]);
        let grants: Vec<i64> = sqlx::query_scalar("SELECT points FROM point_grant ORDER BY id")
            .fetch_all(&mut db)
            .await
            .unwrap();
        assert_eq!(grants, [19, 2, 0, 1], "a small payment has its grant too");
    }

    #[tokio::test]
    async fn a_payload_that_is_not_a_payment_is_rejected_with_a_reason() {
        let mut db = database().await;
        let answers =
            BatchHandler::<Sqlite>::handle_batch(&Points, &mut db, &[paid(1, "", 100)]).await;
        assert_eq!(answers, [Answer::rejected("user is empty")]);
    }

    #[tokio::test]
    async fn what_is_granted_stays_and_doubling_would_show() {
        let mut db = database().await;
        let batch = [paid(1, "ada", 100), paid(1, "ada", 100)];
        let answers = BatchHandler::<Sqlite>::handle_batch(&Points, &mut db, &batch).await;
        assert_eq!(answers, vec![Answer::Consumed; 2]);
        for (sql, text) in [
            ("UPDATE point_grant SET points = 9", "never changed"),
            ("DELETE FROM point_grant", "never removed"),
            (
                "INSERT OR REPLACE INTO point_grant (id, message_id, user, caller, order_id, points)
                 VALUES (1, randomblob(16), 'eve', 'shop', '1', 9)",
                "of this number",
            ),
        ] {
            let error = sqlx::raw_sql(sql).execute(&mut db).await.unwrap_err();
            assert!(error.to_string().contains(text), "{sql}: {error}");
        }
        let (grants, balance): (i64, i64) =
            sqlx::query_as("SELECT count(*), (SELECT points FROM balance) FROM point_grant")
                .fetch_one(&mut db)
                .await
                .unwrap();
        assert_eq!((grants, balance), (2, 2));
    }
}
