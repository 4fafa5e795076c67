//! Grants in SQLite.

use handfast_consumer::{Delivered, Tx};
use sqlx::Sqlite;

use super::{GRANT, Grants, points};
use crate::payment::Payment;

impl Grants for Sqlite {
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
