//! The books in PostgreSQL.

use handfast_consumer::{Delivered, Tx};
use sqlx::{PgConnection, Postgres};

use super::{Books, LINES, VOUCHER};
use crate::payment::Payment;

impl Books for Postgres {
    async fn numbers(tx: &mut Tx<Self>, count: usize) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar("SELECT nextval('voucher_number') FROM generate_series(1, $1)")
            // At most 1,000, which fits.
            .bind(count as i64)
            .fetch_all(tx)
            .await
    }

    async fn book(
        tx: &mut PgConnection,
        id: i64,
        message: &Delivered,
        payment: &Payment,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(LINES)
            .bind(id)
            .bind(payment.clearing())
            .bind(payment.amount)
            .bind(payment.merchant())
            .bind(-payment.amount)
            .execute(&mut *tx)
            .await?;
        sqlx::query(VOUCHER)
            .bind(id)
            .bind(message.message_id)
            .bind(&payment.caller)
            .bind(&payment.order_id)
            .bind(&payment.user)
            .bind(payment.amount)
            .execute(tx)
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use handfast_consumer::{Answer, BatchHandler};
    use sqlx::{AssertSqlSafe, PgPool};
    use tokio_util::sync::CancellationToken;
    use uuid::Uuid;

    use super::super::tests::{paid, payment};
    use crate::Accounting;
    use crate::database::{Database, postgres};
    use handfast_scratch::Scratch;

    use super::*;

    async fn books(scratch: &Scratch) -> PgPool {
        // Two at once, as two processes would, and once more.
        let stop = CancellationToken::new();
        let open = || postgres::open(scratch.options(), &stop);
        let (first, second) = tokio::join!(open(), open());
        first.unwrap().unwrap();
        second.unwrap().unwrap();
        open().await.unwrap().unwrap()
    }

    async fn commit(db: &PgPool, batch: &[Delivered]) -> Result<Vec<Answer>, sqlx::Error> {
        let mut tx = db.begin().await?;
        let answers = BatchHandler::<Postgres>::handle_batch(&Accounting, &mut tx, batch).await;
        tx.commit().await?;
        Ok(answers)
    }

    async fn refusal(db: &PgPool, sql: &str) -> String {
        let mut tx = db.begin().await.unwrap();
        let sql = AssertSqlSafe(sql.to_owned());
        match sqlx::raw_sql(sql).execute(&mut *tx).await {
            Ok(_) => tx.commit().await.unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn payments_that_are_booked_at_once_become_balanced_vouchers() {
        let scratch = Scratch::create().await;
        let db = books(&scratch).await;
        let messages: Vec<_> = (1..=40).map(|n| payment(n, n as i64 * 100)).collect();
        let (one, two) = messages.split_at(20);
        let (one, two) = tokio::join!(commit(&db, one), commit(&db, two));
        assert_eq!(one.unwrap(), vec![Answer::Consumed; 20]);
        assert_eq!(two.unwrap(), vec![Answer::Consumed; 20]);
        let vouchers: Vec<(Uuid, i64)> = sqlx::query_as(
            "SELECT v.message_id, v.amount FROM voucher v JOIN voucher_line l ON l.voucher = v.id
              GROUP BY v.id HAVING count(*) = 2 AND sum(l.amount) = 0 ORDER BY v.message_id",
        )
        .fetch_all(&db)
        .await
        .unwrap();
        assert_eq!(vouchers.len(), 40);
        assert_eq!(vouchers[39], (Uuid::from_u128(40), 4_000));
        let accounts: Vec<(String, i64)> = sqlx::query_as(
            "SELECT account, sum(amount)::bigint FROM voucher_line GROUP BY 1 ORDER BY 1",
        )
        .fetch_all(&db)
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
    async fn a_payment_that_cannot_be_booked_is_told_with_its_reason() {
        let scratch = Scratch::create().await;
        let db = books(&scratch).await;
        let answers = commit(&db, &[paid(1, "?".to_owned())]).await.unwrap();
        assert!(matches!(&answers[0], Answer::Rejected(reason) if reason.contains("payment")));
        // JSON can say what PostgreSQL's text cannot hold.
        let zero = r#"{"caller":"shop","order_id":"\u0000","user":"ada","amount":1}"#;
        let answers = commit(&db, &[paid(2, zero.to_owned())]).await.unwrap();
        assert!(matches!(&answers[0], Answer::Failed(_)), "{answers:?}");
    }

    #[tokio::test]
    async fn the_database_refuses_books_that_do_not_balance() {
        let scratch = Scratch::create().await;
        let db = books(&scratch).await;
        let voucher = "INSERT INTO voucher (id, message_id, caller, order_id, \"user\", amount)
                       VALUES (1, gen_random_uuid(), 'shop', '1', 'ada', 100)";
        for (lines, text) in [
            ("", "at least two lines"),
            ("(1, 1, 'a', 100)", "at least two lines"),
            ("(1, 1, 'a', 100), (1, 2, 'b', -99)", "sum to zero"),
            (
                "(1, 1, 'a', 50), (1, 2, 'b', -50)",
                "debits of a voucher must be its amount",
            ),
        ] {
            let lines = match lines {
                "" => String::new(),
                lines => format!("INSERT INTO voucher_line VALUES {lines};"),
            };
            let error = refusal(&db, &format!("{lines}{voucher}")).await;
            assert!(error.contains(text), "{lines}: {error}");
        }
        let orphan = "INSERT INTO voucher_line VALUES (1, 1, 'a', 100), (1, 2, 'b', -100)";
        assert!(refusal(&db, orphan).await.contains("foreign key"));
    }

    #[tokio::test]
    async fn what_is_booked_stays_and_booking_it_twice_would_show() {
        let scratch = Scratch::create().await;
        let db = books(&scratch).await;
        for _ in 0..2 {
            let answers = commit(&db, &[payment(1, 100)]).await.unwrap();
            assert_eq!(answers, [Answer::Consumed]);
        }
        for (sql, text) in [
            ("UPDATE voucher SET amount = 1", "never changed"),
            ("DELETE FROM voucher", "never removed"),
            ("TRUNCATE voucher CASCADE", "never removed"),
            (
                "UPDATE voucher_line SET amount = amount * 2",
                "never changed",
            ),
            ("DELETE FROM voucher_line", "never removed"),
            (
                "INSERT INTO voucher_line VALUES (1, 3, 'a', 5), (1, 4, 'b', -5)",
                "closed",
            ),
        ] {
            let error = refusal(&db, sql).await;
            assert!(error.contains(text), "{sql}: {error}");
        }
        let vouchers: i64 = sqlx::query_scalar("SELECT count(*) FROM voucher")
            .fetch_one(&db)
            .await
            .unwrap();
        assert_eq!(vouchers, 2);
    }

    #[tokio::test]
    async fn a_database_that_is_not_accountings_is_refused() {
        let scratch = Scratch::create().await;
        let db = PgPool::connect_with(scratch.options()).await.unwrap();
        sqlx::raw_sql("CREATE TABLE voucher_line (id bigint)")
            .execute(&db)
            .await
            .unwrap();
        let url = scratch.url();
        let opened = Database::open(&url, &CancellationToken::new()).await;
        let error = opened.err().unwrap().to_string();
        assert!(
            error.starts_with("cannot prepare the database `"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}
