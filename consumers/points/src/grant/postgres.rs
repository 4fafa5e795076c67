//! Grants in PostgreSQL.

use handfast_consumer::{Delivered, Tx};
use sqlx::Postgres;

use super::{GRANT, Grants, points};
use crate::payment::Payment;

impl Grants for Postgres {
    async fn grant(
        tx: &mut Tx<Self>,
        message: &Delivered,
        payment: &Payment,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(GRANT)
            .bind(message.message_id)
            .bind(&payment.user)
            .bind(&payment.caller)
            .bind(&payment.order_id)
            .bind(points(payment))
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

    use super::super::tests::paid;
    use crate::Points;
    use crate::database::postgres;
    use handfast_scratch::Scratch;

    use super::*;

    async fn database(scratch: &Scratch) -> PgPool {
        // Two at once, as two processes would, and once more.
        let stop = CancellationToken::new();
        let open = || postgres::open(scratch.options(), &stop);
        let (first, second) = tokio::join!(open(), open());
        first.unwrap().unwrap();
        second.unwrap().unwrap();
        open().await.unwrap().unwrap()
    }

    async fn commit(db: &PgPool, batch: &[Delivered]) -> Vec<Answer> {
        let mut tx = db.begin().await.unwrap();
        let answers = BatchHandler::<Postgres>::handle_batch(&Points, &mut tx, batch).await;
        tx.commit().await.unwrap();
        answers
    }

    #[tokio::test]
    async fn grants_at_once_to_the_same_users_neither_collide_nor_get_lost() {
        let scratch = Scratch::create().await;
        let db = database(&scratch).await;
        let mut forth = Vec::new();
        for number in 0..40 {
            forth.push(paid(
                number,
                ["ada", "bob", "eve"][number as usize % 3],
                250,
            ));
        }
        let mut back = forth.clone();
        back.reverse();
        for _ in 0..5 {
            let (one, two) = tokio::join!(commit(&db, &forth), commit(&db, &back));
            assert_eq!(one, vec![Answer::Consumed; 40]);
            assert_eq!(two, vec![Answer::Consumed; 40]);
        }
        let balances: Vec<(String, i64)> =
            sqlx::query_as("SELECT \"user\", points FROM balance ORDER BY 1")
                .fetch_all(&db)
                .await
                .unwrap();
        let sums: Vec<(String, i64)> = sqlx::query_as(
            "SELECT \"user\", sum(points)::bigint FROM point_grant GROUP BY 1 ORDER BY 1",
        )
        .fetch_all(&db)
        .await
        .unwrap();
        let expected = [("ada", 280), ("bob", 260), ("eve", 260)];
        assert_eq!(balances, expected.map(|(user, n)| (user.to_owned(), n)));
        assert_eq!(sums, balances);
    }

    #[tokio::test]
    async fn a_payload_that_is_not_a_payment_is_rejected_with_a_reason() {
        let scratch = Scratch::create().await;
        let db = database(&scratch).await;
        let answers = commit(&db, &[paid(1, "", 100), paid(2, "ada", 100)]).await;
        assert_eq!(
            answers,
            [Answer::rejected("user is empty"), Answer::Consumed]
        );
    }

    #[tokio::test]
    async fn what_is_granted_stays() {
        let scratch = Scratch::create().await;
        let db = database(&scratch).await;
        commit(&db, &[paid(1, "ada", 100)]).await;
        for (sql, text) in [
            ("UPDATE point_grant SET points = 9", "never changed"),
            ("DELETE FROM point_grant", "never removed"),
            ("TRUNCATE point_grant", "never removed"),
        ] {
            let sql = AssertSqlSafe(sql.to_owned());
            let error = sqlx::raw_sql(sql).execute(&db).await.unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
