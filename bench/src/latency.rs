//! Open loop at a fixed rate: what comes late because something before it came late counts as
//! late, from the time at which it was scheduled.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use handfast_producer::Message;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::Failure;
use crate::handfast::Running;
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::topology;

/// A prepare is scheduled this much before its confirm.
const AHEAD: Duration = Duration::from_millis(100);
/// The first confirm is scheduled this much after the start.
const FIRST: Duration = Duration::from_millis(500);
/// No time yet.
const NONE: u64 = u64::MAX;

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cargo run --release -p bench -- latency --rate 1000 --seconds 20"
)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,

    /// Messages per second
    #[arg(long, value_name = "N", default_value_t = 1_000,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,

    /// Length of one round
    #[arg(long, value_name = "N", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
}

/// Measures round by round.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let load_average = options.load_average()?;
    let servers = Servers::start(options).await?;
    let described = servers.described().await?;
    println!("load average at the start: {load_average}; {described}");
    let mut rows: Vec<(&str, Figures)> = [
        "to the handler, p50",
        "to the handler, p99",
        "to the handler, max",
        "prepare, p50",
        "prepare, p99",
    ]
    .map(|name| (name, Figures::default()))
    .into();
    for round in 0..=options.rounds {
        eprintln!("round {round}: {} s", args.seconds);
        let (mut handled, mut prepared) = one_round(&servers, &args).await?;
        let figures = [
            at(&mut handled, 0.5),
            at(&mut handled, 0.99),
            at(&mut handled, 1.0),
            at(&mut prepared, 0.5),
            at(&mut prepared, 0.99),
        ];
        let dropped = if round == 0 { ", dropped" } else { "" };
        eprintln!(
            "round {round}{dropped}: p50 {:.2} ms, p99 {:.2} ms",
            figures[0], figures[1]
        );
        if round == 0 {
            continue;
        }
        for ((_, row), figure) in rows.iter_mut().zip(figures) {
            row.add(figure);
        }
    }
    println!("{}", head(&format!("ms at {}/s", args.rate)));
    for (name, figures) in &rows {
        println!("{}", figures.row(name, 2));
    }
    if options.json {
        let figures: serde_json::Map<String, Value> = rows
            .iter()
            .map(|(name, figures)| ((*name).to_owned(), figures.json()))
            .collect();
        let all = json!({
            "mode": "latency",
            "ms": figures,
            "rate": args.rate,
            "seconds": args.seconds,
            "payload_bytes": options.payload,
            "load_average": load_average,
            "servers": described,
        });
        println!("{all}");
    }
    Ok(())
}

/// Milliseconds from each confirm's time to the handler, and of each prepare.
async fn one_round(servers: &Servers, args: &Args) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    let names = topology::subscriptions(1);
    let place = Place::make(servers).await?;
    let count = u64::from(args.rate) * u64::from(args.seconds);
    let times = || (0..count).map(|_| AtomicU64::new(NONE)).collect::<Vec<_>>();
    let (handled, prepared) = (Arc::new(times()), Arc::new(times()));
    let zero = Instant::now();
    let seen = {
        let handled = handled.clone();
        move |payload: &[u8]| {
            let number = payload
                .first_chunk()
                .map(|bytes| u64::from_le_bytes(*bytes));
            let index = number.and_then(|number| usize::try_from(number).ok());
            if let Some(time) = index.and_then(|index| handled.get(index)) {
                // A copy that comes again is not the first.
                let _ = time.compare_exchange(
                    NONE,
                    micros(zero.elapsed()),
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                );
            }
        }
    };
    let mut running = Running::start(&place, &names, seen).await?;
    let first = zero.elapsed() + FIRST;
    let due = |number: u64| first + Duration::from_secs(1) * number as u32 / args.rate;
    let mut calls: JoinSet<Result<(), Failure>> = JoinSet::new();
    for number in 0..count {
        let confirm_at = due(number);
        sleep_until(zero + confirm_at.saturating_sub(AHEAD)).await;
        let message = message(number, args.options.payload as usize);
        let (producer, prepared) = (running.producer.clone(), prepared.clone());
        calls.spawn(async move {
            let id = Uuid::now_v7();
            let done = producer.prepare(id, &message, None).await;
            done.map_err(Failure::of("prepare"))?;
            let took = zero
                .elapsed()
                .saturating_sub(confirm_at.saturating_sub(AHEAD));
            if let Some(time) = usize::try_from(number).ok().and_then(|n| prepared.get(n)) {
                time.store(micros(took), Ordering::SeqCst);
            }
            sleep_until(zero + confirm_at).await;
            let done = producer.confirm(id).await;
            done.map_err(Failure::of("confirm"))
        });
    }
    while let Some(done) = calls.join_next().await {
        done.map_err(Failure::of("call"))??;
    }
    // The first message of the start counts, too.
    running.all_applied(count + 1).await?;
    running.stop().await?;
    place.remove(servers, &names).await?;
    let read = |times: &[AtomicU64], number: usize| times[number].load(Ordering::SeqCst);
    let range = 0..handled.len();
    let delays = range.clone().map(|number| {
        let late = read(&handled, number).saturating_sub(micros(due(number as u64)));
        late as f64 / 1_000.0
    });
    let prepares = range.map(|number| read(&prepared, number) as f64 / 1_000.0);
    Ok((delays.collect(), prepares.collect()))
}

fn message(number: u64, payload: usize) -> Message {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(payload.max(bytes.len()), b'x');
    Message::new(topology::TOPIC).payload("application/octet-stream", bytes)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(NONE)
}

/// The value that this share of all is not above.
fn at(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    let index = rank.saturating_sub(1).min(values.len().saturating_sub(1));
    values.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_there() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(at(&mut values, 0.5), 50.0);
        assert_eq!(at(&mut values, 0.99), 99.0);
        assert_eq!(at(&mut values, 1.0), 100.0);
        assert_eq!(at(&mut [], 0.5), 0.0);
    }
}
