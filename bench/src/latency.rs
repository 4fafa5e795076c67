//! Open loop at a fixed rate: what comes late because something before it came late counts as
//! late, from the time at which it was scheduled.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use handfast_consumer::Delivered;
use handfast_producer::Message;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::Failure;
use crate::fill::{self, Kind};
use crate::handfast::{Plan, Running};
use crate::options::Options;
use crate::place::Place;
use crate::rounds::{Figures, head};
use crate::servers::Servers;
use crate::{bare_latency, open_loop, rabbitmq_alone, topology};

/// A prepare is scheduled this much before its confirm.
pub(crate) const AHEAD: Duration = Duration::from_millis(100);
/// The first confirm is scheduled this much after the start.
pub(crate) const FIRST: Duration = Duration::from_millis(500);
/// No time yet.
pub(crate) const NONE: u64 = u64::MAX;

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

    /// Deliveries that wait for another subscription, which nobody consumes
    #[arg(long, value_name = "N", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(0..=1_000_000_000))]
    backlog: u64,
}

/// Measures round by round.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = &args.options;
    let (servers, about) = Servers::start(options).await?;
    fill::check_space(servers.postgres_folder(), args.backlog)?;
    let mut rows: Vec<(String, Figures)> = Vec::new();
    for round in 0..=options.rounds {
        eprintln!("round {round}: {} s", args.seconds);
        let measured = one_round(&servers, &args).await?;
        let mut figures = Vec::new();
        for (what, mut times) in [
            ("to the handler", measured.handled),
            ("to the confirm's statement", measured.decided),
            ("prepare", measured.prepared),
            ("confirm", measured.confirmed),
            ("bare pipeline", measured.bare),
            ("bare pipeline behind calls", measured.behind_calls),
            ("RabbitMQ alone", measured.rabbitmq_alone),
        ] {
            for (name, share) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
                figures.push((format!("{what}, {name}"), at(&mut times, share)));
            }
        }
        let dropped = if round == 0 { ", dropped" } else { "" };
        eprintln!(
            "round {round}{dropped}: p50 {:.2} ms, p99 {:.2} ms",
            figures[0].1, figures[1].1
        );
        if round == 0 {
            rows = figures
                .into_iter()
                .map(|(name, _)| (name, Figures::default()))
                .collect();
            continue;
        }
        for ((_, row), (_, figure)) in rows.iter_mut().zip(figures) {
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
            .map(|(name, figures)| (name.clone(), figures.json()))
            .collect();
        let all = json!({
            "mode": "latency",
            "ms": figures,
            "rate": args.rate,
            "seconds": args.seconds,
            "backlog": args.backlog,
            "payload_bytes": options.payload,
            "about": about,
        });
        println!("{all}");
    }
    Ok(())
}

/// What one round gave, in milliseconds, message by message.
struct Round {
    /// From each confirm's time to the handler.
    handled: Vec<f64>,
    /// From each confirm's time to its statement, which is the time of the first send.
    decided: Vec<f64>,
    /// From each prepare's time to its answer.
    prepared: Vec<f64>,
    /// From each confirm's time to its answer.
    confirmed: Vec<f64>,
    /// From each confirm's time to the handler, without the service.
    bare: Vec<f64>,
    /// The same behind calls to a service that does nothing.
    behind_calls: Vec<f64>,
    /// From each message's time to a consumer, without a database.
    rabbitmq_alone: Vec<f64>,
}

async fn one_round(servers: &Servers, args: &Args) -> Result<Round, Failure> {
    let names = topology::subscriptions(1);
    let place = Place::make(servers).await?;
    let count = u64::from(args.rate) * u64::from(args.seconds);
    let times = || Arc::new((0..count).map(|_| AtomicU64::new(NONE)).collect::<Vec<_>>());
    let (handled, decided, prepared, confirmed) = (times(), times(), times(), times());
    let zero = Instant::now();
    // The database's clock is this machine's.
    let since_1970 = wall_clock()?;
    let seen = {
        let (handled, decided) = (handled.clone(), decided.clone());
        move |delivered: &Delivered| {
            let (Some(index), Ok(sent_at)) = (
                number(&delivered.payload),
                u64::try_from(delivered.first_sent_at),
            ) else {
                return;
            };
            // A copy that comes again is not the first.
            note(&handled, index, micros(zero.elapsed()));
            note(&decided, index, sent_at.saturating_sub(since_1970));
        }
    };
    let mut plan = Plan {
        consumed: names.clone(),
        ..Plan::default()
    };
    let mut all = names;
    if args.backlog > 0 {
        plan.unattended.push(topology::ASLEEP.to_owned());
        all.push(topology::ASLEEP.to_owned());
        fill::schema(&place, &all).await?;
        let payload = args.options.payload as usize;
        fill::load(
            &place,
            topology::ASLEEP,
            Kind::Waiting,
            args.backlog,
            payload,
        )
        .await?;
    }
    let mut running = Running::start(&place, plan, seen).await?;
    let first = zero.elapsed() + FIRST;
    let rate = args.rate;
    let due = move |number: u64| first + Duration::from_secs(1) * number as u32 / rate;
    let calls = {
        let (prepared, confirmed) = (prepared.clone(), confirmed.clone());
        let (producer, payload) = (running.producer.clone(), args.options.payload as usize);
        open_loop::run(zero, count, due, AHEAD, move |number, go| {
            let (prepared, confirmed) = (prepared.clone(), confirmed.clone());
            let (producer, message) = (producer.clone(), message(number, payload));
            async move {
                let id = Uuid::now_v7();
                let done = producer.prepare(id, &message, None).await;
                done.map_err(Failure::of("prepare"))?;
                note(&prepared, number as usize, micros(zero.elapsed()));
                go.await.map_err(Failure::of("wait for a confirm's time"))?;
                let done = producer.confirm(id).await;
                done.map_err(Failure::of("confirm"))?;
                note(&confirmed, number as usize, micros(zero.elapsed()));
                Ok(())
            }
        })
    };
    calls.await?;
    // The first message of the start counts, too.
    running.all_applied(count + 1).await?;
    running.stop().await?;
    place.remove(servers, &all).await?;
    let payload = args.options.payload as usize;
    let bare = bare_latency::run(servers, count, rate, payload, false).await?;
    let behind_calls = bare_latency::run(servers, count, rate, payload, true).await?;
    let rabbitmq_alone = rabbitmq_alone::run(servers, count, rate, payload).await?;
    let late = |times: &[AtomicU64], ahead: Duration| {
        let late = |(number, time): (usize, &AtomicU64)| {
            let due = micros(due(number as u64).saturating_sub(ahead));
            time.load(Ordering::SeqCst).saturating_sub(due) as f64 / 1_000.0
        };
        times.iter().enumerate().map(late).collect()
    };
    Ok(Round {
        handled: late(&handled, Duration::ZERO),
        decided: late(&decided, Duration::ZERO),
        prepared: late(&prepared, AHEAD),
        confirmed: late(&confirmed, Duration::ZERO),
        bare,
        behind_calls,
        rabbitmq_alone,
    })
}

/// Microseconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "held against times of the same machine's database"
)]
fn wall_clock() -> Result<u64, Failure> {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970
        .map(micros)
        .map_err(Failure::of("read the clock"))
}

/// Keeps the first time.
pub(crate) fn note(times: &[AtomicU64], index: usize, time: u64) {
    if let Some(kept) = times.get(index) {
        let _ = kept.compare_exchange(NONE, time, Ordering::SeqCst, Ordering::SeqCst);
    }
}

/// A message that carries its number.
pub(crate) fn message(number: u64, payload: usize) -> Message {
    Message::new(topology::TOPIC).payload("application/octet-stream", numbered(number, payload))
}

/// A payload with a number in it.
pub(crate) fn numbered(number: u64, payload: usize) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend(topology::payload(payload.saturating_sub(bytes.len())));
    bytes
}

/// The number that a payload carries.
pub(crate) fn number(payload: &[u8]) -> Option<usize> {
    let number = payload.first_chunk()?;
    usize::try_from(u64::from_le_bytes(*number)).ok()
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(NONE)
}

/// The value that this share of all is not above.
pub(crate) fn at(values: &mut [f64], share: f64) -> f64 {
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
