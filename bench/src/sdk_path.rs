//! What reliable messaging costs a service, as users write it: the business transactions alone, and
//! the same with `transact`, delivered and applied.
//!
//! Beside them what none of it can do without: the business transactions with the statements of the
//! fence, and the bare pipeline. Where each of these keeps the processors busy by itself, both
//! together need the sum of their times.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use handfast_producer::{Message, Outcome, Producer};
use serde_json::json;
use sqlx::PgConnection;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;
use crate::handfast::{Effect, Plan, Running};
use crate::options::Options;
use crate::pipeline::run_bare;
use crate::place::Place;
use crate::servers::Servers;
use crate::sides::{Run, alternate};
use crate::topology::{self, TOPIC};
use crate::usage::Usage;

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- sdk-path --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Business transactions of one side and round
    #[arg(long, value_name = "N", default_value_t = 80_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    messages: u64,

    /// Tasks that each run one transaction at a time
    #[arg(long, value_name = "N", default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..=300))]
    tasks: u32,
}

/// Bytes of what the business writes.
const ROW: usize = 200;

/// Measures all in turn.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    let names = topology::subscriptions(1);
    let sides = ["alone", "transact", "one_by_one", "fenced", "bare"];
    let sides = alternate(options, &sides, async |side| match side {
        0 => business_only(&servers, &args, pay).await,
        1 => transact(&servers, &args, Effect::Row).await,
        2 => transact(&servers, &args, Effect::RowOneByOne).await,
        3 => business_only(&servers, &args, pay_fenced).await,
        _ => run_bare(&servers, &names, args.messages, options.payload as usize).await,
    });
    let sides = sides.await?;
    sides.print();
    let [alone, fenced, bare] = [0, 3, 4].map(|side| sides.per_second(side));
    let both = 1.0 / (1.0 / fenced + 1.0 / bare);
    println!(
        "fenced and bare one after the other: {both:.0}/s, {:.3} of alone",
        both / alone
    );
    if options.json {
        let others = json!({
            "fenced_then_bare_per_s": both,
            "fenced_then_bare_ratio": both / alone,
            "messages": args.messages,
            "tasks": args.tasks,
            "payload_bytes": options.payload,
            "about": about,
        });
        println!("{}", sides.json("sdk-path", others));
    }
    Ok(())
}

/// The producer's own database.
async fn business(place: &Place, args: &Args) -> Result<PgPool, Failure> {
    let pool = PgPoolOptions::new()
        .max_connections(args.tasks + 2)
        .connect(&place.business)
        .await
        .map_err(Failure::of("connect to the business's database"))?;
    sqlx::query("CREATE TABLE payment (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text NOT NULL)")
        .execute(&pool)
        .await
        .map_err(Failure::of("make the business's table"))?;
    let migrated = handfast_producer::migrate(&pool).await;
    migrated.map_err(Failure::of("make the fence"))?;
    Ok(pool)
}

async fn write(tx: &mut PgConnection, note: &str) -> Result<(), sqlx::Error> {
    let pay = sqlx::query("INSERT INTO payment (note) VALUES ($1)").bind(note);
    pay.execute(tx).await.map(|_| ())
}

/// One business transaction.
async fn pay(pool: PgPool, note: String) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &note).await?;
    tx.commit().await
}

/// One business transaction with the statements of the fence, as `transact` makes them.
async fn pay_fenced(pool: PgPool, note: String) -> Result<(), sqlx::Error> {
    let begin = "BEGIN; SET LOCAL synchronous_commit = on";
    let mut tx = pool.begin_with(begin).await?;
    sqlx::query(
        "INSERT INTO handfast_fence (message_id, verdict) VALUES ($1, 'COMMITTED')
         ON CONFLICT (message_id) DO NOTHING",
    )
    .bind(Uuid::now_v7())
    .execute(&mut *tx)
    .await?;
    write(&mut tx, &note).await?;
    sqlx::query("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
        .execute(&mut *tx)
        .await?;
    tx.commit().await
}

async fn business_only<F>(
    servers: &Servers,
    args: &Args,
    pay: impl Fn(PgPool, String) -> F + Copy + Send + 'static,
) -> Result<Run, Failure>
where
    F: Future<Output = Result<(), sqlx::Error>> + Send,
{
    let place = Place::make(servers).await?;
    let pool = business(&place, args).await?;
    let before = Usage::now(servers).await?;
    let began = Instant::now();
    let (next, messages) = (Arc::new(AtomicU64::new(0)), args.messages);
    let mut tasks = JoinSet::new();
    for _ in 0..args.tasks {
        let (next, pool) = (next.clone(), pool.clone());
        tasks.spawn(async move {
            let note = "x".repeat(ROW);
            while next.fetch_add(1, Ordering::Relaxed) < messages {
                pay(pool.clone(), note.clone()).await?;
            }
            Ok::<(), sqlx::Error>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        let done = done.map_err(Failure::of("pay"))?;
        done.map_err(Failure::of("pay"))?;
    }
    let per_second = messages as f64 / began.elapsed().as_secs_f64();
    let used = before.until_now(servers, messages).await?;
    pool.close().await;
    place.remove(servers, &[]).await?;
    Ok(Run {
        per_second,
        used,
        peak_mib: 0.0,
    })
}

async fn transact(servers: &Servers, args: &Args, effect: Effect) -> Result<Run, Failure> {
    let names = topology::subscriptions(1);
    let place = Place::make(servers).await?;
    let pool = business(&place, args).await?;
    let plan = Plan {
        consumed: names.clone(),
        effect,
        ..Plan::default()
    };
    let mut running = Running::start(&place, plan, |_| {}).await?;
    let before = Usage::now(servers).await?;
    let messages = args.messages;
    let took = running
        .load(messages, async |running| {
            pay_all(&running.producer, &pool, args).await
        })
        .await?;
    let used = before.until_now(servers, messages).await?;
    let peak_mib = running.service.peak_mib()?;
    running.stop().await?;
    pool.close().await;
    place.remove(servers, &names).await?;
    Ok(Run {
        per_second: messages as f64 / took.as_secs_f64(),
        used,
        peak_mib,
    })
}

async fn pay_all(producer: &Producer, pool: &PgPool, args: &Args) -> Result<(), Failure> {
    let payload = topology::payload(args.options.payload as usize);
    let message = Message::new(TOPIC).payload("application/octet-stream", payload);
    let (next, messages) = (Arc::new(AtomicU64::new(0)), args.messages);
    let mut tasks = JoinSet::new();
    for _ in 0..args.tasks {
        let (next, pool) = (next.clone(), pool.clone());
        let (producer, message) = (producer.clone(), message.clone());
        tasks.spawn(async move {
            let note = "x".repeat(ROW);
            while next.fetch_add(1, Ordering::Relaxed) < messages {
                let note = note.clone();
                let paid = producer
                    .transact(&pool, message.clone(), async move |tx| {
                        write(tx, &note).await
                    })
                    .await
                    .map_err(Failure::of("transact"))?;
                if !matches!(paid, Outcome::Committed(())) {
                    return Err(Failure(format!("a payment ended as {paid:?}")));
                }
            }
            Ok::<(), Failure>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(Failure::of("pay"))??;
    }
    Ok(())
}
