//! Data that can never be worked on: it is tried again, at once at first and then by a
//! schedule, it ends DEAD where people see it, and it holds up nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, Tx};
use handfast_proto::v1::{
    DeliveryState, ListDeliveriesRequest, NewMessage, PublishRequest, ShowMessageRequest,
    TimelineEntry, item_result,
};
use handfast_tests::books::Delivery;
use handfast_tests::clients::{message, name_of};
use handfast_tests::database::{number, rows};
use handfast_tests::{
    Books, Config, Consuming, Database, Engines, Own, Party, Schema, World, eventually,
    on_both_engines,
};

on_both_engines! {
    broken_items_end_dead_after_their_attempts_and_hold_up_no_neighbour,
    tries_follow_the_schedule,
    rejected_is_dead_at_once_and_later_does_not_count,
    a_handler_that_panics_has_failed,
    a_thousand_failures_at_once_do_not_delay_the_rest,
}

const TOPIC: &str = "item.imported";
const READER: &str = "reader";
const PATIENCE: Duration = Duration::from_secs(30);
const ITEMS: Schema =
    Schema::both("CREATE TABLE item (message_id bytea NOT NULL, payload text NOT NULL)");
const WRITE: &str = "INSERT INTO item (message_id, payload) VALUES ($1, $2)";
/// The waits after the first, second and third failure.
const SCHEDULE_MS: [i64; 3] = [300, 800, 2_000];
const ATTEMPTS: i64 = 4;
/// A busy machine is late by this at most.
const SLACK_MS: i64 = 1_500;
const UNREADABLE: &str = "the item cannot be read";

/// Does what the payload says, and counts how often it was asked to.
#[derive(Clone, Default)]
struct Reader {
    calls: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Reader {
    fn calls(&self, payload: &str) -> usize {
        self.calls
            .lock()
            .unwrap()
            .get(payload)
            .copied()
            .unwrap_or(0)
    }

    async fn read<D: Own>(&self, tx: &mut Tx<D>, message: &Delivered) -> Answer {
        let payload = String::from_utf8(message.payload.to_vec()).expect("text");
        *self
            .calls
            .lock()
            .unwrap()
            .entry(payload.clone())
            .or_default() += 1;
        // Written first: what fails must leave nothing behind.
        D::write(tx, WRITE, message.message_id, &payload)
            .await
            .expect("the reader's database works");
        match payload.split(' ').next() {
            Some("broken") => Answer::failed(UNREADABLE),
            Some("never") => Answer::rejected("no such kind"),
            Some("bomb") => panic!("boom"),
            Some("early") if message.generation <= 2 => Answer::Later(Duration::from_millis(100)),
            _ => Answer::Consumed,
        }
    }
}

impl<D: Own> BatchHandler<D> for Reader {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            answers.push(self.read::<D>(tx, message).await);
        }
        answers
    }
}

struct Import {
    world: World,
    reader: Reader,
    pool: Database,
    _consuming: Consuming,
}

impl Import {
    async fn start(engines: Engines) -> Self {
        let lines = format!("attempts = {ATTEMPTS}\nschedule_ms = {SCHEDULE_MS:?}");
        let config = Config::empty()
            .publisher("importer")
            .topic(TOPIC)
            .subscription_with(READER, TOPIC, &lines);
        let mut world = World::bare(engines, config);
        world.start(Party::Service).await;
        let pool = world.own_database(READER, ITEMS).await;
        let reader = Reader::default();
        let consuming = world.consume(TOPIC, READER, &pool, reader.clone()).await;
        Self {
            world,
            reader,
            pool,
            _consuming: consuming,
        }
    }

    /// Publishes items with these payloads in one call and returns their ids.
    async fn publish(&self, payloads: impl IntoIterator<Item = String>) -> Vec<Vec<u8>> {
        let messages: Vec<_> = payloads
            .into_iter()
            .map(|payload| NewMessage {
                payload: payload.into_bytes().into(),
                ..message(TOPIC)
            })
            .collect();
        let ids = messages.iter().map(|message| message.id.clone()).collect();
        let request = PublishRequest {
            producer: "importer".to_owned(),
            messages,
        };
        let reply = self.world.messages().publish(request).await;
        for result in reply.expect("an answer").into_inner().results {
            let outcome = result.outcome.expect("an outcome");
            assert!(matches!(outcome, item_result::Outcome::State(_)));
        }
        ids
    }

    /// Waits until all these deliveries are in this state.
    async fn until(&self, ids: &[Vec<u8>], state: &str) -> Books {
        eventually(format!("all are {state}"), PATIENCE, async || {
            let books = self.world.books().await;
            let found = of(&books, ids);
            let there = found.iter().filter(|d| d.state == state).count();
            if there == ids.len() {
                return Ok(books);
            }
            Err(format!("{there} of {}, {:?}", ids.len(), found.first()))
        })
        .await
    }

    async fn timeline(&self, id: &[u8]) -> Vec<TimelineEntry> {
        let request = ShowMessageRequest {
            message_id: id.to_vec(),
            with_body: false,
        };
        let reply = self.world.console().show_message(request).await;
        reply.expect("the message is shown").into_inner().timeline
    }

    /// Ids and reasons of everything DEAD, as an operator lists it, page by page.
    async fn dead(&self) -> BTreeMap<Vec<u8>, String> {
        let mut dead = BTreeMap::new();
        let mut cursor = Vec::new();
        loop {
            let request = ListDeliveriesRequest {
                state: DeliveryState::Dead.into(),
                subscription: READER.to_owned(),
                page_size: 100,
                cursor,
            };
            let reply = self.world.console().list_deliveries(request).await;
            let page = reply.expect("a page").into_inner();
            for row in page.deliveries {
                let twice = dead.insert(row.message_id, row.last_error);
                assert_eq!(twice, None, "listed twice");
            }
            cursor = page.next_cursor;
            if cursor.is_empty() {
                return dead;
            }
        }
    }

    /// Each of these has one effect, and nothing else has any.
    async fn only_effects(&self, ids: &[Vec<u8>]) {
        let mut written: Vec<(Vec<u8>,)> = rows(&self.pool, "SELECT message_id FROM item").await;
        written.sort();
        let mut expected = ids.to_vec();
        expected.sort();
        let written: Vec<_> = written.into_iter().map(|(id,)| id).collect();
        assert_eq!(written, expected, "one effect each, and no other");
        let inbox = number(&self.pool, "SELECT count(*) FROM handfast_inbox").await;
        assert_eq!(inbox, i64::try_from(ids.len()).expect("a count"));
    }
}

fn of<'a>(books: &'a Books, ids: &[Vec<u8>]) -> Vec<&'a Delivery> {
    let deliveries = books.deliveries.iter();
    deliveries.filter(|d| ids.contains(&d.message_id)).collect()
}

fn times<'a>(timeline: &'a [TimelineEntry], kind: &str) -> Vec<&'a TimelineEntry> {
    timeline.iter().filter(|entry| entry.kind == kind).collect()
}

/// The end of the last and the end of the first of these.
fn last_and_first(deliveries: &[&Delivery]) -> (i64, i64) {
    let ends = || deliveries.iter().map(|d| d.answered_at.expect("an end"));
    (ends().max().expect("some"), ends().min().expect("some"))
}

async fn broken_items_end_dead_after_their_attempts_and_hold_up_no_neighbour(engines: Engines) {
    let import = Import::start(engines).await;
    let payload = |n| match n % 8 {
        3 => format!("broken {n}"),
        _ => format!("fine {n}"),
    };
    let ids = import.publish((0..48).map(payload)).await;
    let (mut broken, mut fine) = (Vec::new(), Vec::new());
    for (n, id) in ids.into_iter().enumerate() {
        match n % 8 {
            3 => broken.push(id),
            _ => fine.push(id),
        }
    }
    // More come while the broken ones wait for their next try.
    eventually("all broken ones have failed", PATIENCE, async || {
        let books = import.world.books().await;
        let attempts: Vec<_> = of(&books, &broken).iter().map(|d| d.attempts).collect();
        let failed = attempts.iter().all(|attempts| *attempts >= 1);
        failed.then_some(()).ok_or_else(|| format!("{attempts:?}"))
    })
    .await;
    fine.extend(
        import
            .publish((0..20).map(|n| format!("fine, later {n}")))
            .await,
    );
    import.until(&fine, "CONSUMED").await;
    let books = import.until(&broken, "DEAD").await;

    books.one_decision();
    assert_eq!((broken.len(), fine.len()), (6, 62));
    let (last_fine, _) = last_and_first(&of(&books, &fine));
    let (_, first_dead) = last_and_first(&of(&books, &broken));
    assert!(last_fine < first_dead, "neighbours waited for broken ones");
    for delivery in of(&books, &broken) {
        let seen = (delivery.attempts, delivery.generation);
        assert_eq!(seen, (ATTEMPTS, ATTEMPTS), "{delivery:?}");
        assert_eq!(delivery.last_error.as_deref(), Some(UNREADABLE));
    }
    for delivery in of(&books, &fine) {
        let seen = (delivery.attempts, delivery.generation);
        assert_eq!(seen, (0, 1), "a neighbour's failure is not one's own");
    }
    import.only_effects(&fine).await;
    let dead = import.dead().await;
    assert_eq!(dead.len(), broken.len());
    assert!(dead.values().all(|reason| reason == UNREADABLE));
}

async fn tries_follow_the_schedule(engines: Engines) {
    let import = Import::start(engines).await;
    let broken = import.publish((0..5).map(|n| format!("broken {n}"))).await;
    let books = import.until(&broken, "DEAD").await;
    books.one_decision();
    for id in &broken {
        let timeline = import.timeline(id).await;
        let failed: Vec<_> = times(&timeline, "failed").iter().map(|e| e.at).collect();
        assert_eq!(failed.len(), SCHEDULE_MS.len() + 1, "{timeline:?}");
        let sent = times(&timeline, "sent")[0].at;
        let confirmed = times(&timeline, "confirmed")[0].at;
        let at_once = (sent - confirmed) / 1_000;
        assert!(at_once <= SLACK_MS, "first sent after {at_once} ms");
        for (pair, step) in failed.windows(2).zip(SCHEDULE_MS) {
            let waited = (pair[1] - pair[0]) / 1_000;
            let range = step * 9 / 10..=step * 11 / 10 + SLACK_MS;
            let name = name_of(id);
            assert!(
                range.contains(&waited),
                "{name} waited {waited} ms for {step} ms"
            );
        }
        let dead = times(&timeline, "dead");
        assert_eq!(dead.len(), 1, "{timeline:?}");
        // By one clock, but not at the same tick.
        let after = dead[0].at - failed[SCHEDULE_MS.len()];
        assert!((0..100_000).contains(&after), "{after} µs after the last");
    }
    import.only_effects(&[]).await;
}

async fn rejected_is_dead_at_once_and_later_does_not_count(engines: Engines) {
    let import = Import::start(engines).await;
    let payloads = ["never", "early", "fine"];
    let ids = import.publish(payloads.map(str::to_owned)).await;
    let (never, early) = (&ids[0], &ids[1]);
    import.until(&ids[1..], "CONSUMED").await;
    let books = import.until(&ids[..1], "DEAD").await;

    books.one_decision();
    let rejected = of(&books, &ids[..1])[0];
    assert_eq!((rejected.attempts, rejected.generation), (0, 1));
    assert_eq!(
        rejected.last_error.as_deref(),
        Some("rejected: no such kind")
    );
    let timeline = import.timeline(never).await;
    assert_eq!(times(&timeline, "rejected").len(), 1, "{timeline:?}");
    assert_eq!(times(&timeline, "dead").len(), 1, "{timeline:?}");
    assert_eq!(times(&timeline, "failed").len(), 0, "{timeline:?}");

    let late = of(&books, &ids[1..2])[0];
    assert_eq!(
        (late.attempts, late.generation),
        (0, 3),
        "two LATER, then CONSUMED"
    );
    let timeline = import.timeline(early).await;
    let laters: Vec<_> = times(&timeline, "later").iter().map(|e| e.at).collect();
    assert_eq!(laters.len(), 2, "{timeline:?}");
    let consumed = times(&timeline, "consumed")[0].at;
    for (from, to) in [(laters[0], laters[1]), (laters[1], consumed)] {
        assert!(to - from >= 100_000, "it came back after {} µs", to - from);
    }
    import.only_effects(&ids[1..]).await;
}

async fn a_handler_that_panics_has_failed(engines: Engines) {
    let import = Import::start(engines).await;
    let ids = import.publish(["bomb", "fine"].map(str::to_owned)).await;
    import.until(&ids[1..], "CONSUMED").await;
    let books = import.until(&ids[..1], "DEAD").await;

    books.one_decision();
    let bomb = of(&books, &ids[..1])[0];
    assert_eq!((bomb.attempts, bomb.generation), (ATTEMPTS, ATTEMPTS));
    assert_eq!(bomb.last_error.as_deref(), Some("handler panicked: boom"));
    let calls = import.reader.calls("bomb");
    assert!(calls >= 4, "four attempts are four calls, not {calls}");
    import.only_effects(&ids[1..]).await;
}

async fn a_thousand_failures_at_once_do_not_delay_the_rest(engines: Engines) {
    let import = Import::start(engines).await;
    let mut broken = Vec::new();
    for wave in 0..2 {
        let payloads = (0..500).map(|n| format!("broken {wave}-{n}"));
        broken.extend(import.publish(payloads).await);
    }
    let fine = import.publish((0..200).map(|n| format!("fine {n}"))).await;
    import.until(&fine, "CONSUMED").await;
    let books = import.until(&broken, "DEAD").await;

    books.one_decision();
    let (last_fine, _) = last_and_first(&of(&books, &fine));
    let (_, first_dead) = last_and_first(&of(&books, &broken));
    assert!(last_fine < first_dead, "neighbours waited for broken ones");
    let ahead = (first_dead - last_fine) / 1_000;
    eprintln!("the last neighbour was done {ahead} ms before the first broken one was given up");
    for delivery in of(&books, &broken) {
        assert_eq!(delivery.attempts, ATTEMPTS, "{delivery:?}");
    }
    import.only_effects(&fine).await;
    let dead = import.dead().await;
    assert_eq!(
        dead.len(),
        broken.len(),
        "a person can list every one of them"
    );
}
