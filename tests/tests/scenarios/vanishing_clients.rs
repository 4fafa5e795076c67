//! Clients hang up at any moment: every message is wholly there or not at all, every delivery
//! is given to somebody else, and the service goes on.
//!
//! Streams, and the calls that answer what came on them, are the embedded broker's. On
//! PostgreSQL a call that is dropped must not leave its connection inside of a transaction.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _, stream};
use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::{
    AnswerKind, AnswerOutcome, CountsRequest, MessageState, NewMessage, PrepareRequest,
    PublishRequest, ShowMessageRequest, VerdictKind,
};
use handfast_tests::clients::{RawConsumer, message, name_of};
use handfast_tests::database::{number, rows};
use handfast_tests::status::{Behaviour, StatusStub};
use handfast_tests::{Config, Engines, Party, World, eventually, stays};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tonic::Code;

const SHOP: &str = "shop";
const TOPIC: &str = "fact";
const READERS: [&str; 2] = ["reader", "archive"];
const STATUS_PORT: u16 = 8_000;
/// Of each of the four verbs.
const CALLS: usize = 250;
/// At the same moment.
const CONCURRENT: usize = 32;
const STREAMS: usize = 50;
const SEED: u64 = 20_260;
const SOON: Duration = Duration::from_secs(20);
const DRAIN: Duration = Duration::from_secs(60);

/// A service with two subscriptions, and a producer that is always still at it.
async fn scene(engines: Engines) -> (World, StatusStub) {
    let mut world = World::bare(engines, Config::empty());
    let status = world.address(STATUS_PORT);
    let lines = "attempts = \"unlimited\"\nschedule_ms = [200]";
    world.config = Config::empty()
        .producer(SHOP, status)
        .topic(TOPIC)
        .subscription_with(READERS[0], TOPIC, lines)
        .subscription_with(READERS[1], TOPIC, lines);
    let stub = StatusStub::start(status, Behaviour::Says(VerdictKind::InProgress)).await;
    world.start(Party::Service).await;
    (world, stub)
}

/// From a call that is not sent yet to one that was answered long ago, as evenly on a slow
/// machine as on a quick one.
fn patience(chance: &mut StdRng) -> Duration {
    let longest_ms = 1 << chance.random_range(0..=8);
    Duration::from_millis(chance.random_range(0..=longest_ms))
}

fn facts(count: usize) -> Vec<NewMessage> {
    (0..count).map(|_| message(TOPIC)).collect()
}

async fn publish_all(world: &World, messages: &[NewMessage]) {
    let request = PublishRequest {
        producer: SHOP.to_owned(),
        messages: messages.to_vec(),
    };
    let published = world.messages().publish(request).await;
    let results = published.expect("an answer").into_inner().results;
    let accepted = results
        .iter()
        .filter(|r| r.outcome == Some(Outcome::State(MessageState::Confirmed.into())));
    assert_eq!(accepted.count(), messages.len());
}

async fn reader(world: &World, subscription: &str, credit: u32) -> RawConsumer {
    RawConsumer::open(world.deliveries(), TOPIC, subscription, credit).await
}

/// A last consumer takes whatever is still open.
async fn consume_the_rest(world: &World, subscription: &str) {
    let mut last = reader(world, subscription, 10_000).await;
    let what = format!("nothing is open by {subscription}");
    eventually(what, DRAIN, async || {
        while let Some(delivery) = last.next_within(Duration::from_millis(200)).await {
            last.consumed(&delivery).await;
        }
        let deliveries = world.books().await.deliveries.into_iter();
        let open = deliveries
            .filter(|d| d.subscription == subscription && d.state != "CONSUMED")
            .count();
        (open == 0)
            .then_some(())
            .ok_or_else(|| format!("{open} open"))
    })
    .await;
}

/// True if the message is wholly there, false if nothing is; half of it fails the test.
async fn is_there(world: &World, message: &NewMessage) -> bool {
    let name = name_of(&message.id);
    let request = ShowMessageRequest {
        message_id: message.id.clone(),
        with_body: true,
    };
    let shown = match world.console().show_message(request).await {
        Ok(shown) => shown.into_inner(),
        Err(status) => {
            assert_eq!(status.code(), Code::NotFound, "{name}: {status}");
            return false;
        }
    };
    assert_eq!(shown.payload, message.payload, "{name}");
    let deliveries = match shown.message.expect("a row").state() {
        MessageState::Prepared => 0,
        MessageState::Confirmed => READERS.len(),
        other => panic!("{name} is {other:?}"),
    };
    assert_eq!(shown.deliveries.len(), deliveries, "{name}");
    true
}

/// A fresh message goes all the way to both readers.
async fn a_message_passes(world: &World) {
    let shop = world.raw(SHOP);
    let message = message(TOPIC);
    assert_eq!(shop.prepare(&message).await, Ok(MessageState::Prepared));
    let confirmed = shop.confirm(&message.id).await;
    assert_eq!(confirmed, Ok(MessageState::Confirmed));
    for subscription in READERS {
        let mut reader = reader(world, subscription, 1).await;
        let delivery = reader.next().await;
        assert_eq!(delivery.message_id, message.id, "nothing else is open");
        reader.consumed(&delivery).await;
    }
    let log = std::fs::read_to_string(world.file("service.log")).expect("a log");
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test]
async fn calls_that_are_dropped_at_any_moment_leave_nothing_half_done() {
    let (world, _stub) = scene(Engines::Embedded).await;
    let shop = world.raw(SHOP);
    let (to_prepare, to_publish) = (facts(CALLS), facts(CALLS));
    let (to_confirm, to_acknowledge) = (facts(CALLS), facts(CALLS));
    publish_all(&world, &to_acknowledge).await;
    let holder = async {
        let credit = u32::try_from(CALLS).unwrap();
        let mut holder = reader(&world, READERS[0], credit).await;
        let mut held = Vec::new();
        while held.len() < CALLS {
            held.push(holder.next().await);
        }
        (holder, held)
    };
    let (holder, held) = holder.await;
    let prepare = PrepareRequest {
        producer: SHOP.to_owned(),
        messages: to_confirm.clone(),
    };
    world.messages().prepare(prepare).await.expect("an answer");

    let call = async |n: usize| {
        let nth = n / 4;
        match n % 4 {
            0 => {
                let prepared = shop.prepare(&to_prepare[nth]).await;
                assert_eq!(prepared, Ok(MessageState::Prepared));
            }
            1 => {
                let published = shop.try_publish(&to_publish[nth]).await;
                let published = published.expect("an answer");
                assert_eq!(published, Ok(MessageState::Confirmed));
            }
            2 => {
                let confirmed = shop.confirm(&to_confirm[nth].id).await;
                assert_eq!(confirmed, Ok(MessageState::Confirmed));
            }
            _ => {
                let outcome = holder.answer(&held[nth], AnswerKind::Consumed, "").await;
                assert_eq!(outcome, AnswerOutcome::Recorded);
            }
        }
    };
    eprintln!("seed {SEED}");
    let mut chance = StdRng::seed_from_u64(SEED);
    let call = &call;
    let answered: Vec<_> = stream::iter(0..4 * CALLS)
        .map(|n| {
            let patience = patience(&mut chance);
            async move {
                // A timer waits a millisecond at least, in which a quick machine has sent the
                // call; one that is dropped before that has to be dropped at once.
                let answered = match patience.is_zero() {
                    true => call(n).now_or_never().is_some(),
                    false => timeout(patience, call(n)).await.is_ok(),
                };
                (n, answered)
            }
        })
        .buffer_unordered(CONCURRENT)
        .collect()
        .await;
    let dropped: Vec<_> = answered.iter().filter(|(_, answered)| !answered).collect();
    let kept = answered.len() - dropped.len();
    assert!(
        dropped.len() >= 50 && kept >= 50,
        "{} dropped, {kept} answered",
        dropped.len()
    );

    // The requests that were sent may still be on their way through the service.
    a_message_settles(&world).await;
    let (mut there, mut absent) = (0, 0);
    for (n, answered) in &answered {
        let message = match n % 4 {
            0 => &to_prepare[n / 4],
            1 => &to_publish[n / 4],
            _ => continue,
        };
        let found = is_there(&world, message).await;
        assert!(found || !answered, "{} is lost", name_of(&message.id));
        match (found, answered) {
            (true, false) => there += 1,
            (false, _) => absent += 1,
            (true, true) => {}
        }
    }
    assert!(
        there > 0 && absent > 0,
        "of the dropped, {there} are there and {absent} are not"
    );
    for message in to_confirm.iter().chain(&to_acknowledge) {
        assert!(is_there(&world, message).await);
    }
    every_message_has_one_body(&world).await;

    // What was dropped is called again and waited for.
    stream::iter(0..4 * CALLS)
        .for_each_concurrent(CONCURRENT, call)
        .await;
    drop(holder);
    for message in &to_prepare {
        let cancelled = shop.cancel(&message.id).await;
        assert_eq!(cancelled, Ok(MessageState::Cancelled));
    }
    for subscription in READERS {
        consume_the_rest(&world, subscription).await;
    }
    a_message_passes(&world).await;
    let books = world.books().await;
    assert_eq!(books.unfinished(), None);
    assert_eq!(books.messages.len(), 4 * CALLS + 2);
    assert_eq!(books.deliveries.len(), READERS.len() * (3 * CALLS + 1));
    books.one_decision();
    every_message_has_one_body(&world).await;
}

/// One writer writes in order: once this is durable, so is whatever came before it.
async fn a_message_settles(world: &World) {
    let message = message(TOPIC);
    let shop = world.raw(SHOP);
    assert_eq!(shop.prepare(&message).await, Ok(MessageState::Prepared));
    let cancelled = shop.cancel(&message.id).await;
    assert_eq!(cancelled, Ok(MessageState::Cancelled));
}

async fn every_message_has_one_body(world: &World) {
    let db = world.database("service").await;
    let messages = number(&db, "SELECT count(*) FROM message").await;
    let buckets: Vec<(i64,)> = rows(&db, "SELECT number FROM body_bucket").await;
    let mut bodies = 0;
    for (bucket,) in buckets {
        bodies += number(&db, &format!("SELECT count(*) FROM body_{bucket}")).await;
        let orphans = format!(
            "SELECT count(*) FROM body_{bucket}
              WHERE message_id NOT IN (SELECT id FROM message)"
        );
        assert_eq!(number(&db, &orphans).await, 0, "bodies without a message");
    }
    assert_eq!(bodies, messages);
    db.close().await;
}

#[tokio::test]
async fn streams_that_are_dropped_at_any_moment_lose_nothing() {
    let (world, _stub) = scene(Engines::Embedded).await;
    let facts = facts(4 * STREAMS);
    publish_all(&world, &facts).await;
    eprintln!("seed {SEED}");
    let mut chance = StdRng::seed_from_u64(SEED);
    let received = AtomicUsize::new(0);
    stream::iter(0..STREAMS)
        .map(|n| {
            let patience = patience(&mut chance);
            // Fewer answers than messages, so that the streams never run out of them.
            let (credit, answers) = (chance.random_range(1..=50), chance.random_range(0..=3));
            let (world, received) = (&world, &received);
            async move {
                let (opened, first) = oneshot::channel();
                let mut opened = Some(opened);
                let consume = async move {
                    let mut reader = reader(world, READERS[0], credit).await;
                    for taken in 0.. {
                        let delivery = reader.next().await;
                        received.fetch_add(1, Ordering::Relaxed);
                        drop(opened.take());
                        if taken < answers {
                            reader.consumed(&delivery).await;
                        }
                    }
                };
                let hangs_up = async move {
                    // Every fifth hangs up whether it has got something or not.
                    if n % 5 > 0 {
                        drop::<Result<(), _>>(first.await);
                    }
                    sleep(patience).await;
                };
                tokio::select! {
                    () = consume => unreachable!("it consumes until it is dropped"),
                    () = hangs_up => {}
                }
            }
        })
        .buffer_unordered(5)
        .for_each(|()| async {})
        .await;
    let received = received.into_inner();
    assert!(
        received >= STREAMS / 2,
        "{received} deliveries were received"
    );
    eventually("the service has let the streams go", SOON, async || {
        let counts = world.console().counts(CountsRequest {}).await;
        let subscriptions = counts.expect("an answer").into_inner().subscriptions;
        let open: u32 = subscriptions.iter().map(|s| s.consumers).sum();
        (open == 0)
            .then_some(())
            .ok_or_else(|| format!("{open} are open"))
    })
    .await;
    let books = world.books().await;
    let by_reader = || {
        books
            .deliveries
            .iter()
            .filter(|d| d.subscription == READERS[0])
    };
    let left = by_reader().filter(|d| d.state != "CONSUMED");
    let returned = left.filter(|d| d.generation > 0).count();
    assert!(returned > 0, "nobody dropped anything that was sent");
    let consumed = by_reader().filter(|d| d.state == "CONSUMED").count();
    assert!(consumed > 0, "nobody answered anything");

    for subscription in READERS {
        consume_the_rest(&world, subscription).await;
    }
    a_message_passes(&world).await;
    let books = world.books().await;
    assert_eq!(books.unfinished(), None);
    assert_eq!(books.deliveries.len(), READERS.len() * (facts.len() + 1));
    books.one_decision();
}

#[tokio::test]
async fn calls_that_are_dropped_leave_no_session_of_postgresql_inside_of_a_transaction() {
    let (world, _stub) = scene(Engines::Production).await;
    let shop = world.raw(SHOP);
    let (to_prepare, to_publish) = (facts(CALLS), facts(CALLS));
    let (to_confirm, to_cancel) = (facts(CALLS), facts(CALLS));
    for messages in [&to_confirm, &to_cancel] {
        let prepare = PrepareRequest {
            producer: SHOP.to_owned(),
            messages: messages.clone(),
        };
        world.messages().prepare(prepare).await.expect("an answer");
    }
    let call = async |n: usize| {
        let nth = n / 4;
        let answered = match n % 4 {
            0 => shop.prepare(&to_prepare[nth]).await,
            1 => shop.try_publish(&to_publish[nth]).await.expect("an answer"),
            2 => shop.confirm(&to_confirm[nth].id).await,
            _ => shop.cancel(&to_cancel[nth].id).await,
        };
        answered.expect("it is accepted");
    };
    eprintln!("seed {SEED}");
    let mut chance = StdRng::seed_from_u64(SEED);
    let call = &call;
    let answered: Vec<_> = stream::iter(0..4 * CALLS)
        .map(|n| {
            let patience = patience(&mut chance);
            async move {
                match patience.is_zero() {
                    true => call(n).now_or_never().is_some(),
                    false => timeout(patience, call(n)).await.is_ok(),
                }
            }
        })
        .buffer_unordered(CONCURRENT)
        .collect()
        .await;
    let dropped = answered.iter().filter(|answered| !**answered).count();
    let kept = answered.len() - dropped;
    assert!(
        dropped >= 50 && kept >= 50,
        "{dropped} dropped, {kept} answered"
    );

    let db = world.database("service").await;
    let stuck = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
            AND state LIKE 'idle in transaction%' AND state_change < {}",
        db.ago(500)
    );
    let time = Duration::from_secs(2);
    stays("no session is inside of a transaction", time, async || {
        let stuck = number(&db, &stuck).await;
        (stuck == 0)
            .then_some(())
            .ok_or_else(|| format!("{stuck} are"))
    })
    .await;
    every_message_has_one_body(&world).await;

    // What was dropped is called again and waited for.
    stream::iter(0..4 * CALLS)
        .for_each_concurrent(CONCURRENT, call)
        .await;
    every_message_has_one_body(&world).await;
    let books = world.books().await;
    books.one_decision();
    assert_eq!(books.messages.len(), 4 * CALLS);
    let confirmed = books.messages.iter().filter(|m| m.state == "CONFIRMED");
    assert_eq!(confirmed.count(), 2 * CALLS);
    assert_eq!(books.deliveries.len(), READERS.len() * 2 * CALLS);
}
