//! A payout service: pays out each withdrawal that it is told of, once. A withdrawal whose
//! payload is `poison` ends the whole process.
//!
//! Usage: payout SERVICE_URL DATABASE

use std::time::Duration;

use handfast_consumer::{Answer, Consumer, Delivered, Handler, Tx, handfast};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tokio_util::sync::CancellationToken;

/// No unique key, so that paying twice would show.
const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS payout (message_id BLOB NOT NULL, what TEXT NOT NULL)";

struct Payout;

impl Handler for Payout {
    async fn handle(&self, tx: &mut Tx, withdrawal: &Delivered) -> Answer {
        let what = String::from_utf8_lossy(&withdrawal.payload).into_owned();
        if what == "poison" {
            std::process::abort();
        }
        let paid = sqlx::query("INSERT INTO payout (message_id, what) VALUES (?, ?)")
            .bind(withdrawal.message_id.as_bytes().as_slice())
            .bind(what)
            .execute(tx)
            .await;
        paid.map_or_else(Answer::failed, |_| Answer::Consumed)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    handfast_fail_points::arm_from_environment()?;
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: payout SERVICE_URL DATABASE";
    let (service, database) = (
        arguments.next().ok_or(usage)?,
        arguments.next().ok_or(usage)?,
    );
    let file = SqliteConnectOptions::new()
        .filename(database)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(5));
    let pool = SqlitePoolOptions::new().connect_with(file).await?;
    sqlx::raw_sql(SCHEMA).execute(&pool).await?;
    Consumer::connect(handfast(service))
        .await?
        .subscription("withdrawal", "payout")
        .inbox(pool)
        .handler_timeout(Duration::from_millis(1_500))
        .run(Payout, CancellationToken::new())
        .await?;
    Ok(())
}
