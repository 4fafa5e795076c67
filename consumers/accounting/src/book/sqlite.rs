//! The books in SQLite.

use handfast_consumer::{Delivered, Tx};
use sqlx::{Sqlite, SqliteConnection};

use super::{Books, LINES, VOUCHER};
use crate::payment::Payment;

impl Books for Sqlite {
    async fn numbers(tx: &mut Tx<Self>, count: usize) -> Result<Vec<i64>, sqlx::Error> {
        // The transaction is the only writer, so the numbers behind the last one are free.
        let last: i64 = sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM voucher")
            .fetch_one(tx)
            .await?;
        Ok((last + 1..).take(count).collect())
    }

    async fn book(
        tx: &mut SqliteConnection,
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
