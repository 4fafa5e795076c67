//! One voucher per payment: debit the user's clearing account, credit the merchant's.

mod postgres;
mod sqlite;

use std::future::Future;
use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, InboxDatabase, Tx};
use sqlx::error::DatabaseError;

use crate::payment::Payment;

/// How long a message waits that met a database which could not write.
const DATABASE_LATER: Duration = Duration::from_secs(5);

/// The double entry.
const LINES: &str = r#"
    INSERT INTO voucher_line (voucher, line, account, amount)
    VALUES ($1, 1, $2, $3),
           ($1, 2, $4, $5)
"#;

/// The voucher, which closes its lines.
const VOUCHER: &str = r#"
    INSERT INTO voucher (id, message_id, caller, order_id, "user", amount)
    VALUES ($1, $2, $3, $4, $5, $6)
"#;

/// A database that accounting can keep its books in.
pub trait Books: InboxDatabase {
    /// So many numbers that no other voucher has.
    fn numbers(
        tx: &mut Tx<Self>,
        count: usize,
    ) -> impl Future<Output = Result<Vec<i64>, sqlx::Error>> + Send;

    /// Writes the lines of voucher `id`, and then the voucher.
    fn book(
        tx: &mut Tx<Self>,
        id: i64,
        message: &Delivered,
        payment: &Payment,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

/// The handler of `payment.completed`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accounting;

impl<D: Books> BatchHandler<D> for Accounting {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let ids = match D::numbers(tx, messages.len()).await {
            Ok(ids) => ids,
            Err(error) => return vec![word_on::<D>(&error); messages.len()],
        };
        let mut answers = Vec::with_capacity(messages.len());
        for (message, id) in messages.iter().zip(ids) {
            let payment = match Payment::read(&message.payload) {
                Ok(payment) => payment,
                Err(unreadable) => {
                    answers.push(Answer::rejected(unreadable));
                    continue;
                }
            };
            if let Err(error) = D::book(tx, id, message, &payment).await {
                answers.push(word_on::<D>(&error));
                break;
            }
            answers.push(Answer::Consumed);
        }
        // After an error nothing of the batch stays, and each message gets its turn alone.
        answers.resize(messages.len(), Answer::Later(DATABASE_LATER));
        answers
    }
}

/// A rule of the schema that refuses is the message's failure. A full or failing disk is not:
/// it must not use up the attempts of every message that comes by.
fn word_on<D: Books>(error: &sqlx::Error) -> Answer {
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

    async fn books() -> SqliteConnection {
        let mut db = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        // Applied at every start, so it is applied twice.
        sqlx::raw_sql(SCHEMA).execute(&mut db).await.unwrap();
        sqlx::raw_sql(SCHEMA).execute(&mut db).await.unwrap();
        db
    }

    pub(crate) fn paid(number: u128, payload: String) -> Delivered {
        Delivered {
            message_id: Uuid::from_u128(number),
            subscription: "accounting".to_owned(),
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

    pub(crate) fn payment(number: u128, amount: i64) -> Delivered {
        paid(
            number,
            format!(r#"{{"caller":"shop","order_id":"{number}","user":"ada","amount":{amount}}}"#),
        )
    }

    async fn commit(db: &mut SqliteConnection, batch: &[Delivered]) -> Vec<Answer> {
        let mut tx = db.begin().await.unwrap();
        let answers = BatchHandler::<Sqlite>::handle_batch(&Accounting, &mut tx, batch).await;
        tx.commit().await.unwrap();
        answers
    }

    async fn refusal(db: &mut SqliteConnection, sql: &'static str) -> String {
        let mut tx = db.begin().await.unwrap();
        let refused = match sqlx::raw_sql(sql).execute(&mut *tx).await {
            Ok(_) => return tx.commit().await.unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        tx.rollback().await.unwrap();
        refused
    }

    #[tokio::test]
    async fn a_batch_of_payments_becomes_balanced_vouchers() {
        let mut db = books().await;
        let messages: Vec<_> = (1..=40).map(|n| payment(n, n as i64 * 100)).collect();
        for batch in messages.chunks(15) {
            let answers = commit(&mut db, batch).await;
            assert!(answers.iter().all(|answer| *answer == Answer::Consumed));
        }
        let vouchers: Vec<(i64, Vec<u8>, i64)> = sqlx::query_as(
            "SELECT v.id, v.message_id, v.amount FROM voucher v JOIN voucher_line l ON l.voucher = v.id
              GROUP BY v.id HAVING count(*) = 2 AND sum(l.amount) = 0 ORDER BY v.id",
        )
        .fetch_all(&mut db)
        .await
        .unwrap();
        assert_eq!(vouchers.len(), 40);
        assert_eq!(
            vouchers[39],
            (40, Uuid::from_u128(40).into_bytes().to_vec(), 4_000)
        );
        let accounts: Vec<(String, i64)> = sqlx::query_as(
            "SELECT account, sum(amount) FROM voucher_line GROUP BY account ORDER BY account",
        )
        .fetch_all(&mut db)
        .await
        .unwrap();
        let total = 100 * 40 * 41 / 2;
        let expected = [
            ("clearing:ada".to_owned(), total),
            ("merchant:shop".to_owned(), -total),
        ];
        assert_eq!(accounts, expected);
    }

    #[tokio::test]
    async fn a_payload_that_is_not_a_payment_is_rejected_with_a_reason() {
        let mut db = books().await;
        let batch = [payment(1, 100), paid(2, "?".to_owned()), payment(3, -1)];
        let answers = commit(&mut db, &batch).await;
        assert_eq!(answers[0], Answer::Consumed);
        assert!(matches!(&answers[1], Answer::Rejected(reason) if reason.contains("payment")));
        assert!(matches!(&answers[2], Answer::Rejected(reason) if reason.contains("-1")));
    }

    #[tokio::test]
    async fn the_database_refuses_books_that_do_not_balance() {
        let mut db = books().await;
        let voucher = "INSERT INTO voucher (id, message_id, caller, order_id, user, amount)
                       VALUES (1, randomblob(16), 'shop', '1', 'ada', 100)";
        for (lines, text) in [
            ("", "at least two lines"),
            (
                "INSERT INTO voucher_line VALUES (1, 1, 'a', 100);",
                "at least two lines",
            ),
            (
                "INSERT INTO voucher_line VALUES (1, 1, 'a', 100), (1, 2, 'b', -99);",
                "sum to zero",
            ),
            (
                "INSERT INTO voucher_line VALUES (1, 1, 'a', 50), (1, 2, 'b', -50);",
                "debits of a voucher must be its amount",
            ),
        ] {
            let sql = format!("{lines}{voucher}");
            let error = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("BEGIN;{sql}")))
                .execute(&mut db)
                .await
                .unwrap_err();
            assert!(error.to_string().contains(text), "{sql}: {error}");
            sqlx::raw_sql("ROLLBACK").execute(&mut db).await.unwrap();
        }
        let orphan = "INSERT INTO voucher_line VALUES (1, 1, 'a', 100), (1, 2, 'b', -100)";
        assert!(refusal(&mut db, orphan).await.contains("FOREIGN KEY"));
    }

    #[tokio::test]
    async fn what_is_booked_stays() {
        let mut db = books().await;
        let answers = commit(&mut db, &[payment(1, 100)]).await;
        assert_eq!(answers, [Answer::Consumed]);
        for (sql, text) in [
            ("UPDATE voucher SET amount = 1", "never changed"),
            ("DELETE FROM voucher", "never removed"),
            (
                "UPDATE voucher_line SET amount = amount * 2",
                "never changed",
            ),
            ("DELETE FROM voucher_line", "never removed"),
            (
                "INSERT INTO voucher_line VALUES (1, 3, 'a', 5), (1, 4, 'b', -5)",
                "closed",
            ),
            (
                "INSERT OR REPLACE INTO voucher_line VALUES (1, 1, 'thief', 100)",
                "closed",
            ),
            (
                "INSERT OR REPLACE INTO voucher (id, message_id, caller, order_id, user, amount)
                 VALUES (1, randomblob(16), 'shop', '1', 'eve', 100)",
                "of this number",
            ),
        ] {
            let error = refusal(&mut db, sql).await;
            assert!(error.contains(text), "{sql}: {error}");
        }
    }

    #[tokio::test]
    async fn the_same_message_booked_twice_would_show() {
        let mut db = books().await;
        for _ in 0..2 {
            let answers = commit(&mut db, &[payment(1, 100)]).await;
            assert_eq!(answers, [Answer::Consumed]);
        }
        let vouchers: i64 = sqlx::query_scalar("SELECT count(*) FROM voucher")
            .fetch_one(&mut db)
            .await
            .unwrap();
        assert_eq!(vouchers, 2);
    }
}
