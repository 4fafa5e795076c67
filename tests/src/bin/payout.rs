//! A payout service: pays out each withdrawal that it is told of, once. A withdrawal whose
//! payload is `poison` ends the whole process. It takes its time if `PAYOUT_WORK_MS` says so, and
//! holds no more at once than `PAYOUT_PREFETCH`.
//!
//! ```text
//! payout SERVICE_URL FILE                      embedded broker, SQLite
//! payout RABBITMQ_URL DEPLOYMENT POSTGRES_URL  RabbitMQ, PostgreSQL
//! ```

use std::time::Duration;

use handfast_consumer::{Answer, Consumer, Delivered, Handler, Tx, handfast, rabbitmq};
use handfast_tests::Own;
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tokio_util::sync::CancellationToken;

/// No unique key, so that paying twice would show.
const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS payout (message_id bytea NOT NULL, what text NOT NULL)";
const PAY: &str = "INSERT INTO payout (message_id, what) VALUES ($1, $2)";
/// How long one withdrawal takes, in milliseconds.
const WORK: &str = "PAYOUT_WORK_MS";
/// How many may be here unanswered.
const PREFETCH: &str = "PAYOUT_PREFETCH";
const HANDLER_TIMEOUT: Duration = Duration::from_millis(1_500);

#[derive(Clone, Copy)]
struct Payout {
    work: Duration,
}

impl<D: Own> Handler<D> for Payout {
    async fn handle(&self, tx: &mut Tx<D>, withdrawal: &Delivered) -> Answer {
        let what = String::from_utf8_lossy(&withdrawal.payload);
        if what == "poison" {
            std::process::abort();
        }
        tokio::time::sleep(self.work).await;
        let paid = D::write(tx, PAY, withdrawal.message_id, &what).await;
        paid.map_or_else(Answer::failed, |()| Answer::Consumed)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    handfast_fail_points::arm_from_environment()?;
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let end = CancellationToken::new();
    let work_ms = std::env::var(WORK).map_or(Ok(0), |ms| ms.parse())?;
    let prefetch = std::env::var(PREFETCH).map_or(Ok(200), |number| number.parse())?;
    let handler = Payout {
        work: Duration::from_millis(work_ms),
    };
    match words[..] {
        [service, file] => {
            let options = SqliteConnectOptions::new()
                .filename(file)
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .busy_timeout(Duration::from_secs(5));
            let pool = SqlitePoolOptions::new().connect_with(options).await?;
            sqlx::raw_sql(SCHEMA).execute(&pool).await?;
            let consumer = Consumer::connect(handfast(service)).await?;
            let payout = consumer
                .subscription("withdrawal", "payout")
                .inbox(pool)
                .prefetch(prefetch);
            payout
                .handler_timeout(HANDLER_TIMEOUT)
                .run(handler, end)
                .await?;
        }
        [url, deployment, database] => {
            let pool = PgPoolOptions::new().connect(database).await?;
            sqlx::raw_sql(SCHEMA).execute(&pool).await?;
            let source = rabbitmq(url).deployment(deployment);
            let consumer = Consumer::connect(source).await?;
            let payout = consumer
                .subscription("withdrawal", "payout")
                .inbox(pool)
                .prefetch(prefetch);
            payout
                .handler_timeout(HANDLER_TIMEOUT)
                .run(handler, end)
                .await?;
        }
        _ => {
            return Err(
                "usage: payout SERVICE_URL FILE | payout RABBITMQ_URL DEPLOYMENT POSTGRES_URL"
                    .into(),
            );
        }
    }
    Ok(())
}
