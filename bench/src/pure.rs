//! The pure code that every message passes: nanoseconds per call.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use handfast_service::broker::handoff::Handoffs;
use handfast_service::message::{
    ContentHash, Limits, MessageEvent, MessageId, MessageState, NewMessage, Timestamp,
};
use handfast_service::store::Handed;
use serde_json::json;
use uuid::Uuid;

use crate::Failure;
use crate::options::Options;
use crate::rounds::{Figures, head};
use crate::topology::{PRODUCER, TOPIC, payload as payload_of};

/// What the mode takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  cargo run --release -p bench -- pure --json")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
}

type Call<'a> = Box<dyn Fn() + 'a>;

/// One measurement takes this long at least.
const SPAN: Duration = Duration::from_millis(200);

/// Measures round by round. No server is needed.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let options = &args.options;
    let load_average = options.load_average()?;
    println!("load average at the start: {load_average}");
    let message = message(options.payload as usize);
    let (limits, now) = (Limits::default(), Timestamp::from_micros(0));
    let handoffs = Arc::new(Handoffs::default());
    let handed = handed(&message);
    let calls: [(&str, Call<'_>); 4] = [
        (
            "content hash",
            Box::new(|| {
                let _ = black_box(message.content_hash());
            }),
        ),
        (
            "limits of a message",
            Box::new(|| {
                let _ = black_box(limits.check(&message, now));
            }),
        ),
        (
            "state of a message",
            Box::new(|| {
                let state = black_box(MessageState::Prepared);
                let _ = black_box(state.apply(MessageEvent::Confirm));
            }),
        ),
        (
            "a permit and its handoff",
            Box::new(|| {
                let room = [(handed.subscription.clone(), 10)];
                let permit = handoffs.permit(1, SPAN, SPAN, room);
                handoffs.keep(&permit, vec![handed.clone()]);
                let _ = black_box(handoffs.take(1, 1, |_| true));
            }),
        ),
    ];
    let mut rows: BTreeMap<&str, Figures> = BTreeMap::new();
    for round in 0..=options.rounds {
        for (name, call) in &calls {
            let figure = nanoseconds(call);
            if round > 0 {
                rows.entry(name).or_default().add(figure);
            }
        }
    }
    println!("{}", head("ns per call"));
    for (name, row) in &rows {
        println!("{}", row.row(name, 0));
    }
    if options.json {
        let figures: serde_json::Map<_, _> = rows
            .iter()
            .map(|(name, row)| ((*name).to_owned(), row.json()))
            .collect();
        let about = json!({ "load_average": load_average });
        let all = json!({
            "mode": "pure",
            "ns": figures,
            "payload_bytes": options.payload,
            "about": about,
        });
        println!("{all}");
    }
    Ok(())
}

fn nanoseconds(call: &dyn Fn()) -> f64 {
    let began = Instant::now();
    let mut calls: u32 = 0;
    while began.elapsed() < SPAN {
        for _ in 0..100 {
            call();
        }
        calls = calls.saturating_add(100);
    }
    began.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
}

fn message(payload: usize) -> NewMessage {
    NewMessage {
        id: MessageId::from(Uuid::now_v7()),
        producer: PRODUCER.to_owned(),
        topic: TOPIC.to_owned(),
        key: Some("order 42 paid".to_owned()),
        content_type: "application/json".to_owned(),
        headers: vec![("trace".to_owned(), "42".to_owned())],
        payload: payload_of(payload),
        deliver_after: None,
        fence: None,
    }
}

fn handed(message: &NewMessage) -> Handed {
    Handed {
        subscription: "sink-1".to_owned(),
        id: message.id,
        token: Uuid::nil(),
        producer: message.producer.clone(),
        topic: message.topic.clone(),
        key: message.key.clone(),
        sent_at: Timestamp::from_micros(0),
        body_bytes: message.body_bytes(),
        bucket: 1,
        content_hash: ContentHash::of(message),
    }
}
