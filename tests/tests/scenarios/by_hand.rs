//! A lucky bag from a shop that can die between any two of its writes: it has no SQL
//! transactions, prepares and confirms by hand, and answers status checks from its folder.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use handfast_consumer::{Answer as Word, BatchHandler, Delivered, Tx};
use handfast_producer::{Answer, BusinessStatus, Question, StatusServer};
use handfast_proto::v1::{
    CountsRequest, DeliveryRow, DeliveryState, ListDeliveriesRequest, MessageState, NewMessage,
    ShowMessageRequest, ShowMessageResponse,
};
use handfast_tests::books::Delivery;
use handfast_tests::clients::{Raw, message, name_of};
use handfast_tests::database::{number, rows};
use handfast_tests::{
    Books, Config, Consuming, Database, Engines, Own, Party, Schema, World, eventually,
    on_both_engines,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::async_trait;

on_both_engines! {
    a_shop_that_dies_before_its_confirm_sends_the_bag_by_its_answer_to_the_check,
    a_sale_whose_second_write_failed_is_cancelled_and_never_delivered,
    not_found_decides_nothing_however_often_it_is_answered,
    a_bag_that_can_never_be_sent_ends_dead_where_people_see_why,
    in_a_flash_sale_later_is_too_late,
}

const TOPIC: &str = "bag.won";
const WAREHOUSE: &str = "warehouse";
const STATUS_PORT: u16 = 8411;
const PATIENCE: Duration = Duration::from_secs(30);
const PARCELS: Schema =
    Schema::both("CREATE TABLE parcel (message_id bytea NOT NULL, bag text NOT NULL)");
const SEND: &str = "INSERT INTO parcel (message_id, bag) VALUES ($1, $2)";
const NO_COURIER: &str = "no courier goes there";

/// A shop whose database is a folder of files: each write is done or not, and no two of them
/// are done together. Dropped, it is dead: it neither confirms nor answers.
struct Shop {
    raw: Raw,
    folder: PathBuf,
    status: JoinHandle<()>,
}

/// Reads what became of a sale from the folder, as a shop that starts again must.
struct Ledger(PathBuf);

impl Shop {
    async fn open(world: &World) -> Self {
        let folder = world.file("shop");
        for part in ["paid", "won", "void"] {
            std::fs::create_dir_all(folder.join(part)).expect("the shop's folder");
        }
        let server = StatusServer::new().answered_by(Ledger(folder.clone()));
        let serving = server.serve(world.address(STATUS_PORT), CancellationToken::new());
        Self {
            raw: world.raw("shop"),
            folder,
            status: tokio::spawn(async move { serving.await.expect("the shop answers") }),
        }
    }

    /// Hands the message over and makes the first write: the bag is paid.
    async fn takes_money(&self, bag: &str) -> NewMessage {
        let won = NewMessage {
            key: Some(format!("bag {bag}")),
            payload: bag.to_owned().into_bytes().into(),
            ..message(TOPIC)
        };
        assert_eq!(self.raw.prepare(&won).await, Ok(MessageState::Prepared));
        write_new(&self.folder.join("paid").join(name_of(&won.id)), bag).expect("the first write");
        won
    }

    /// The second write: the bag belongs to this sale. A place on the shelf is given once.
    fn gives_bag(&self, won: &NewMessage, place: &str) -> std::io::Result<()> {
        write_new(&self.folder.join("won").join(place), &name_of(&won.id))
    }

    /// Undoes a sale, for ever.
    fn gives_money_back(&self, won: &NewMessage) {
        write_new(&self.folder.join("void").join(name_of(&won.id)), "").expect("a new file");
    }

    /// Both writes and the confirm.
    async fn sells(&self, bag: &str) -> NewMessage {
        let won = self.takes_money(bag).await;
        self.gives_bag(&won, bag).expect("a free place");
        let confirmed = self.raw.confirm(&won.id).await;
        assert_eq!(confirmed, Ok(MessageState::Confirmed));
        won
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.status.abort();
    }
}

fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[async_trait]
impl BusinessStatus for Ledger {
    async fn status(&self, question: Question) -> Answer {
        let id = question.message_id.to_string();
        for place in std::fs::read_dir(self.0.join("won")).expect("the shelf") {
            let owner = std::fs::read_to_string(place.expect("a place").path());
            if owner.expect("an owner") == id {
                return Answer::Committed;
            }
        }
        if self.0.join("void").join(id).exists() {
            Answer::RolledBack
        } else {
            // Paid or not, the shop may still come to give the bag.
            Answer::Unknown
        }
    }
}

/// Sends bags, unless no courier goes there; it keeps a list of what it was ever given.
#[derive(Clone, Default)]
struct Warehouse {
    given: Arc<Mutex<Vec<String>>>,
}

impl Warehouse {
    fn given(&self) -> Vec<String> {
        self.given.lock().unwrap().clone()
    }

    async fn sends<D: Own>(&self, tx: &mut Tx<D>, message: &Delivered) -> Word {
        let bag = String::from_utf8(message.payload.to_vec()).expect("text");
        self.given.lock().unwrap().push(bag.clone());
        if bag == "to the moon" {
            return Word::failed(NO_COURIER);
        }
        let sent = D::write(tx, SEND, message.message_id, &bag).await;
        sent.map_or_else(Word::failed, |_| Word::Consumed)
    }
}

impl<D: Own> BatchHandler<D> for Warehouse {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Word> {
        let mut answers = Vec::new();
        for message in messages {
            answers.push(self.sends::<D>(tx, message).await);
        }
        answers
    }
}

/// A world in which the service runs and knows a shop, and a warehouse with these lines.
async fn world(engines: Engines, lines: &str) -> World {
    let mut world = World::bare(engines, Config::empty());
    world.config = Config::empty()
        .producer("shop", world.address(STATUS_PORT))
        .topic(TOPIC)
        .subscription_with(WAREHOUSE, TOPIC, lines);
    world.start(Party::Service).await;
    world
}

async fn warehouse(world: &World) -> (Warehouse, Consuming, Database) {
    let pool = world.own_database(WAREHOUSE, PARCELS).await;
    let handler = Warehouse::default();
    let consuming = world.consume(TOPIC, WAREHOUSE, &pool, handler.clone());
    (handler, consuming.await, pool)
}

/// Waits until the delivery of this message has ended like this.
async fn until_delivery(world: &World, id: &[u8], state: &str) -> Books {
    eventually(format!("a bag is {state}"), PATIENCE, async || {
        let books = world.books().await;
        match deliveries(&books, id).as_slice() {
            [only] if only.state == state => Ok(books),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

fn deliveries(books: &Books, id: &[u8]) -> Vec<Delivery> {
    let deliveries = books.deliveries.iter();
    deliveries.filter(|d| d.message_id == id).cloned().collect()
}

async fn shown(world: &World, id: &[u8]) -> ShowMessageResponse {
    let request = ShowMessageRequest {
        message_id: id.to_vec(),
        with_body: true,
    };
    let reply = world.console().show_message(request).await;
    reply.expect("the message is shown").into_inner()
}

/// The details of this kind in the timeline.
fn told(shown: &ShowMessageResponse, kind: &str) -> Vec<String> {
    let entries = shown.timeline.iter().filter(|entry| entry.kind == kind);
    entries.map(|entry| entry.detail.clone()).collect()
}

async fn dead(world: &World) -> Vec<DeliveryRow> {
    let request = ListDeliveriesRequest {
        state: DeliveryState::Dead.into(),
        ..ListDeliveriesRequest::default()
    };
    let reply = world.console().list_deliveries(request).await;
    reply.expect("a list").into_inner().deliveries
}

/// What the warehouse has sent, by its own database.
async fn parcels(pool: &Database) -> Vec<String> {
    let parcels: Vec<(String,)> = rows(pool, "SELECT bag FROM parcel ORDER BY bag").await;
    parcels.into_iter().map(|(bag,)| bag).collect()
}

async fn a_shop_that_dies_before_its_confirm_sends_the_bag_by_its_answer_to_the_check(
    engines: Engines,
) {
    let world = world(engines, "").await;
    let (_, _consuming, pool) = warehouse(&world).await;
    let shop = Shop::open(&world).await;
    let mut sold = Vec::new();
    for bag in ["1", "2", "3"] {
        let won = shop.takes_money(bag).await;
        shop.gives_bag(&won, bag).expect("a free place");
        sold.push(won);
    }
    drop(shop);

    // It is asked in vain; that decides nothing, and counts as no answer.
    eventually("the shop is seen to be away", PATIENCE, async || {
        let counts = world.console().counts(CountsRequest {}).await;
        let producers = counts.expect("counts").into_inner().producers;
        let away = producers.iter().any(|p| p.unreachable && p.prepared == 3);
        away.then_some(()).ok_or_else(|| format!("{producers:?}"))
    })
    .await;
    let books = world.books().await;
    for message in &books.messages {
        let seen = (message.state.as_str(), message.checks);
        assert_eq!(seen, ("PREPARED", 0));
    }
    assert!(books.deliveries.is_empty(), "{:?}", books.deliveries);

    let _shop = Shop::open(&world).await;
    for won in &sold {
        until_delivery(&world, &won.id, "CONSUMED").await;
    }
    let books = world.books().await;
    books.one_decision();
    assert_eq!(books.unfinished(), None);
    assert_eq!(books.decided("CONFIRMED", "CHECK"), 3);
    assert_eq!(parcels(&pool).await, ["1", "2", "3"]);
}

async fn a_sale_whose_second_write_failed_is_cancelled_and_never_delivered(engines: Engines) {
    let world = world(engines, "").await;
    let (warehouse, _consuming, pool) = warehouse(&world).await;
    let shop = Shop::open(&world).await;
    let first = shop.takes_money("7").await;
    let second = shop.takes_money("7 again").await;
    shop.gives_bag(&first, "7").expect("a free place");
    let failed = shop.gives_bag(&second, "7");
    let failed = failed.expect_err("a place is given once").kind();
    assert_eq!(failed, std::io::ErrorKind::AlreadyExists);
    shop.gives_money_back(&second);
    // It dies before it can confirm the one and cancel the other.
    drop(shop);

    let shop = Shop::open(&world).await;
    eventually("cancelled", PATIENCE, async || {
        let books = world.books().await;
        let message = books.messages.iter().find(|m| m.id == second.id);
        let state = &message.expect("it was stored").state;
        (state == "CANCELLED").then_some(()).ok_or(state.clone())
    })
    .await;
    until_delivery(&world, &first.id, "CONSUMED").await;
    // Who comes late with the same word is told that it is so.
    let cancelled = shop.raw.cancel(&second.id).await;
    assert_eq!(cancelled, Ok(MessageState::Cancelled));
    // What is sold afterwards comes through, so nothing was on its way before it.
    let third = shop.sells("8").await;
    let books = until_delivery(&world, &third.id, "CONSUMED").await;

    books.one_decision();
    assert_eq!(books.unfinished(), None);
    assert_eq!(books.decided("CANCELLED", "CHECK"), 1);
    assert_eq!(books.decided("CONFIRMED", "CHECK"), 1);
    assert_eq!(books.decided("CONFIRMED", "PRODUCER"), 1);
    assert_eq!(deliveries(&books, &second.id).len(), 0);
    assert_eq!(parcels(&pool).await, ["7", "8"]);
    assert!(!warehouse.given().contains(&"7 again".to_owned()));
}

async fn not_found_decides_nothing_however_often_it_is_answered(engines: Engines) {
    let world = world(engines, "").await;
    let (warehouse, _consuming, pool) = warehouse(&world).await;
    let shop = Shop::open(&world).await;
    let won = shop.takes_money("5").await;
    // It dies between its two writes.
    drop(shop);

    let shop = Shop::open(&world).await;
    let books = eventually("three answers", PATIENCE, async || {
        let books = world.books().await;
        let checks = books.messages[0].checks;
        (checks >= 3).then_some(books).ok_or(checks.to_string())
    })
    .await;
    assert_eq!(books.messages[0].state, "PREPARED");
    assert!(books.deliveries.is_empty(), "{:?}", books.deliveries);
    assert!(warehouse.given().is_empty());
    let status = shop.raw.get(&won.id).await.expect("it is known");
    assert_eq!(status.state(), MessageState::Prepared);
    assert!(status.checks >= 3, "{status:?}");
    assert!(!status.unresolved, "three answers are not twenty");

    // The shop goes on where it stopped, and its word is still taken.
    shop.gives_bag(&won, "5").expect("a free place");
    let confirmed = shop.raw.confirm(&won.id).await;
    assert_eq!(confirmed, Ok(MessageState::Confirmed));
    let books = until_delivery(&world, &won.id, "CONSUMED").await;
    books.one_decision();
    assert_eq!(parcels(&pool).await, ["5"]);
}

async fn a_bag_that_can_never_be_sent_ends_dead_where_people_see_why(engines: Engines) {
    let world = world(engines, "attempts = 3\nschedule_ms = [200, 400]").await;
    let (warehouse, _consuming, pool) = warehouse(&world).await;
    let shop = Shop::open(&world).await;
    let mut sold = Vec::new();
    for bag in ["1", "to the moon", "2"] {
        sold.push(shop.sells(bag).await);
    }
    let lost = &sold[1];
    for won in [&sold[0], &sold[2]] {
        until_delivery(&world, &won.id, "CONSUMED").await;
    }
    let books = until_delivery(&world, &lost.id, "DEAD").await;
    books.one_decision();

    let listed = dead(&world).await;
    assert_eq!(listed.len(), 1, "{listed:?}");
    let row = &listed[0];
    assert_eq!((&row.message_id, row.attempts), (&lost.id, 3));
    assert_eq!(row.subscription, WAREHOUSE);
    assert_eq!(row.last_error, NO_COURIER);
    assert_eq!(row.due_at, None, "nothing is due any more");

    let shown = shown(&world, &lost.id).await;
    assert_eq!(shown.payload, b"to the moon", "a person sees what it was");
    let failed = (1..=3).map(|send| format!("send {send}: {NO_COURIER}"));
    assert_eq!(told(&shown, "failed"), failed.collect::<Vec<_>>());
    assert_eq!(told(&shown, "dead"), [NO_COURIER]);
    assert!(shown.timeline.is_sorted_by_key(|entry| entry.at));

    assert_eq!(parcels(&pool).await, ["1", "2"]);
    let given = warehouse.given();
    let tries = given.iter().filter(|bag| *bag == "to the moon").count();
    assert!(tries >= 3, "three attempts are three tries, not {tries}");
    let inbox = number(&pool, "SELECT count(*) FROM handfast_inbox").await;
    assert_eq!(inbox, 2, "what failed left no trace");
}

async fn in_a_flash_sale_later_is_too_late(engines: Engines) {
    let world = world(
        engines,
        "attempts = \"unlimited\"\nschedule_ms = [300]\nmax_age_s = 3",
    )
    .await;
    let shop = Shop::open(&world).await;
    // Nobody is at the warehouse.
    let missed = shop.sells("1").await;
    until_delivery(&world, &missed.id, "DEAD").await;
    // Somebody is, and fails until it is too late.
    let (warehouse, _consuming, pool) = warehouse(&world).await;
    let in_time = shop.sells("2").await;
    until_delivery(&world, &in_time.id, "CONSUMED").await;
    let lost = shop.sells("to the moon").await;
    let books = until_delivery(&world, &lost.id, "DEAD").await;

    books.one_decision();
    assert_eq!(books.unfinished(), None);
    let listed = dead(&world).await;
    let ids: Vec<_> = listed.iter().map(|row| &row.message_id).collect();
    match engines {
        Engines::Embedded => {
            assert_eq!(ids, [&missed.id, &lost.id]);
            assert_eq!(listed[0].generation, 0, "it was never sent");
        }
        // RabbitMQ held it all the time. Who took it there after all has said so, and that is
        // the truth about it.
        Engines::Production => {
            assert_eq!(ids, [&lost.id]);
            until_delivery(&world, &missed.id, "CONSUMED").await;
        }
    }
    for row in &listed {
        let reason = "older than the subscription's max_age";
        assert_eq!(row.last_error, reason);
        assert_eq!(
            told(&shown(&world, &row.message_id).await, "dead"),
            [reason]
        );
    }
    let tried = listed.last().expect("the lost one");
    assert!(tried.attempts >= 1, "it was tried: {tried:?}");
    for delivery in books.deliveries.iter().filter(|d| d.state == "DEAD") {
        let age = delivery.answered_at.expect("an end") - delivery.confirmed_at;
        assert!(age >= 3_000_000, "given up after {age} µs");
    }
    let sent = parcels(&pool).await;
    let given = warehouse.given().contains(&"1".to_owned());
    match engines {
        Engines::Embedded => assert_eq!((sent, given), (vec!["2".to_owned()], false)),
        Engines::Production => {
            assert_eq!((sent, given), (vec!["1".to_owned(), "2".to_owned()], true));
        }
    }
}
