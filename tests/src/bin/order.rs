//! An order service: has its orders paid from the user's balance, and never takes "no answer"
//! for "not paid".
//!
//! ```text
//! order pay PAYMENT_URL DATABASE ID USER AMOUNT   one try; prints PAID, REFUSED or UNKNOWN
//! order reconcile PAYMENT_URL DATABASE            compares with payment, until it is killed
//! ```

use std::error::Error;
use std::time::Duration;

use payment::client::{GetPaymentRequest, PayRequest, PaymentClient, PaymentStatus};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longer than this the user does not look at the screen.
const PATIENCE: Duration = Duration::from_secs(1);
/// The job looks this often, and leaves an order alone this long after it was looked at.
const INTERVAL: Duration = Duration::from_millis(300);
const MERCHANT: &str = "shop";
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS shop_order (
        id     TEXT    NOT NULL PRIMARY KEY,
        user   TEXT    NOT NULL,
        amount INTEGER NOT NULL,
        state  TEXT    NOT NULL CHECK (state IN ('PAYING', 'PAID', 'REFUSED')),
        -- When the job may look at it; it moves this forward before it does.
        due_at INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    -- One row per order that was settled, without a unique key so that doubling would show.
    CREATE TABLE IF NOT EXISTS settled (id TEXT NOT NULL, state TEXT NOT NULL) STRICT;";

type Failure = Box<dyn Error>;

struct Orders {
    payment: PaymentClient<Channel>,
    db: SqlitePool,
}

#[derive(Clone)]
struct Order {
    id: String,
    user: String,
    amount: i64,
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["pay", payment, database, id, user, amount] => {
            let orders = Orders::open(payment, database).await?;
            let order = Order {
                id: id.to_owned(),
                user: user.to_owned(),
                amount: amount.parse()?,
            };
            println!("{}", orders.pay(&order).await?);
            Ok(())
        }
        ["reconcile", payment, database] => {
            let orders = Orders::open(payment, database).await?;
            loop {
                orders.reconcile().await?;
                tokio::time::sleep(INTERVAL).await;
            }
        }
        _ => Err("usage: order pay … | order reconcile …".into()),
    }
}

impl Orders {
    async fn open(payment: &str, database: &str) -> Result<Self, Failure> {
        let channel = Endpoint::from_shared(payment.to_owned())?
            .timeout(PATIENCE)
            .connect_lazy();
        let file = SqliteConnectOptions::new()
            .filename(database)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(5));
        let db = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(file)
            .await?;
        sqlx::raw_sql(SCHEMA).execute(&db).await?;
        Ok(Self {
            payment: PaymentClient::new(channel),
            db,
        })
    }

    /// Writes down that it is going to ask, asks, and writes down what it has learned.
    async fn pay(&self, order: &Order) -> Result<&'static str, Failure> {
        sqlx::query(
            "INSERT INTO shop_order (id, user, amount, state) VALUES (?, ?, ?, 'PAYING')
             ON CONFLICT (id) DO NOTHING",
        )
        .bind(&order.id)
        .bind(&order.user)
        .bind(order.amount)
        .execute(&self.db)
        .await?;
        match self.ask(order).await {
            Ok(PaymentStatus::Paid) => self.settle(order, "PAID").await,
            Ok(PaymentStatus::Refused) => self.settle(order, "REFUSED").await,
            Ok(_) => Ok("UNKNOWN"),
            // No answer is not a "no": the order stays PAYING, and the job finds out.
            Err(status) if status.code() != Code::AlreadyExists => Ok("UNKNOWN"),
            Err(status) => Err(status.into()),
        }
    }

    async fn ask(&self, order: &Order) -> Result<PaymentStatus, Status> {
        let request = PayRequest {
            caller: MERCHANT.to_owned(),
            order_id: order.id.clone(),
            user: order.user.clone(),
            amount: order.amount,
        };
        Ok(self.payment.clone().pay(request).await?.get_ref().status())
    }

    async fn settle(&self, order: &Order, state: &'static str) -> Result<&'static str, Failure> {
        let mut tx = self.db.begin_with("BEGIN IMMEDIATE").await?;
        let settled =
            sqlx::query("UPDATE shop_order SET state = ? WHERE id = ? AND state = 'PAYING'")
                .bind(state)
                .bind(&order.id)
                .execute(&mut *tx)
                .await?;
        if settled.rows_affected() == 1 {
            sqlx::query("INSERT INTO settled (id, state) VALUES (?, ?)")
                .bind(&order.id)
                .bind(state)
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        Ok(state)
    }

    /// Compares what is not settled with what payment says.
    async fn reconcile(&self) -> Result<(), Failure> {
        let due: Vec<(String, String, i64)> = sqlx::query_as(
            "UPDATE shop_order SET due_at = CAST(unixepoch('subsec') * 1000 AS INTEGER) + ?
              WHERE state = 'PAYING' AND due_at <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
             RETURNING id, user, amount",
        )
        .bind(i64::try_from(INTERVAL.as_millis())?)
        .fetch_all(&self.db)
        .await?;
        for (id, user, amount) in due {
            let order = Order { id, user, amount };
            let request = GetPaymentRequest {
                caller: MERCHANT.to_owned(),
                order_id: order.id.clone(),
            };
            match self.payment.clone().get_payment(request).await {
                Ok(reply) => match reply.get_ref().status() {
                    PaymentStatus::Paid => drop(self.settle(&order, "PAID").await?),
                    PaymentStatus::Refused => drop(self.settle(&order, "REFUSED").await?),
                    PaymentStatus::Processing | PaymentStatus::Unspecified => {}
                },
                // The question never arrived, so it is asked again.
                Err(status) if status.code() == Code::NotFound => drop(self.pay(&order).await?),
                Err(_) => {}
            }
        }
        Ok(())
    }
}
