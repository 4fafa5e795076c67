//! What only a database that goes on after a lost transaction can get wrong.

use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, Tx, handfast};
use handfast_proto::v1::AnswerKind;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{Connection as _, Sqlite};

use crate::common::{Database as _, World};

/// Does what the payload says and never stops at an error.
struct Careless;

impl Careless {
    async fn obey(tx: &mut Tx, message: &Delivered) -> Result<(), sqlx::Error> {
        match message.payload.as_ref() {
            b"full" => return meet_a_full_disk(tx).await,
            b"commit" => sqlx::raw_sql("COMMIT").execute(&mut *tx).await.map(drop)?,
            b"another" => {
                let sql = "ROLLBACK; BEGIN IMMEDIATE";
                sqlx::raw_sql(sql).execute(&mut *tx).await.map(drop)?;
            }
            b"savepoint" => {
                let mut inner = tx.begin().await?;
                Sqlite::insert_effect(&mut inner, message.message_id, "undone").await?;
                inner.rollback().await?;
            }
            _ => {}
        }
        Sqlite::insert_effect(tx, message.message_id, "done").await
    }
}

/// The disk has room again afterwards.
async fn meet_a_full_disk(tx: &mut Tx) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("PRAGMA max_page_count = 1")
        .execute(&mut *tx)
        .await?;
    let sql = "INSERT INTO effect (message_id, word) VALUES (zeroblob(1000000), 'full')";
    let written = sqlx::raw_sql(sql).execute(&mut *tx).await;
    sqlx::raw_sql("PRAGMA max_page_count = 1000000")
        .execute(&mut *tx)
        .await?;
    written.map(drop)
}

impl BatchHandler for Careless {
    async fn handle_batch(&self, tx: &mut Tx, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            let obeyed = Self::obey(tx, message).await;
            let hides = message.payload.as_ref() != b"full";
            answers.push(match obeyed {
                Err(error) if !hides => Answer::failed(error),
                Ok(()) | Err(_) => Answer::Consumed,
            });
        }
        answers
    }
}

#[tokio::test]
async fn a_disk_that_is_full_in_the_middle_of_a_batch_has_nothing_applied_twice() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let words = ["ok", "full", "ok", "ok"];
    service.deliver_all((1..).zip(words).map(|(n, word)| service.delivery(n, word)));
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run_batch(Careless, world.shutdown.clone()));
    service.until_answers(words.len()).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.failed), (3, 1));
    for number in [1, 3, 4] {
        let applied = (world.effects(number).await, world.seen(number).await);
        assert_eq!(applied, (1, 1), "{number}");
    }
    assert_eq!((world.all_effects().await, world.seen(2).await), (3, 0));
    service.script(|script| assert!(script.reason(2).contains("full"), "{}", script.reason(2)));
}

#[tokio::test]
async fn nothing_is_committed_by_a_handler_that_ends_the_transaction() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let words = ["commit", "another", "savepoint"];
    service.deliver_all((1..).zip(words).map(|(n, word)| service.delivery(n, word)));
    let subscriber = world.subscriber().await.max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(Careless, world.shutdown.clone()));
    service.until_answers(words.len()).await;
    world.stop(running).await;
    for number in [1, 2] {
        let applied = (world.effects(number).await, world.seen(number).await);
        assert_eq!(applied, (0, 0), "{number}");
        service.script(|script| {
            assert_eq!(script.words(number), [AnswerKind::Failed]);
            assert_eq!(
                script.reason(number),
                "the transaction was rolled back, but the handler said CONSUMED"
            );
        });
    }
    // A savepoint is the handler's own.
    assert_eq!((world.effects(3).await, world.seen(3).await), (1, 1));
}

#[tokio::test]
async fn a_connection_comes_back_to_its_pool_as_it_was() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let file = SqliteConnectOptions::new()
        .filename(world.home.path().join("consumer.db"))
        .busy_timeout(Duration::from_secs(5));
    let one = SqlitePoolOptions::new().max_connections(1);
    let pool = one.connect_with(file).await.unwrap();
    let consumer = Consumer::connect(handfast(service.address()))
        .await
        .unwrap()
        .subscription("payment.completed", "accounting")
        .inbox(pool.clone())
        .max_batch(1);
    let running = tokio::spawn(consumer.run_batch(world.obedient(), world.shutdown.clone()));
    for (number, word) in [(1, "ok"), (2, "fail")] {
        service.deliver(number, word);
        service.until_answers(number as usize).await;
        let mut db = pool.acquire().await.unwrap();
        let sql = "INSERT INTO effect (message_id, word) VALUES (zeroblob(16), 'my own')";
        Sqlite::run(&mut db, sql.to_owned()).await;
    }
    world.stop(running).await;
    let own = "SELECT count(*) FROM effect WHERE word = 'my own'";
    assert_eq!(Sqlite::count(&world.pool, own).await, 2);
    assert_eq!(world.effects(1).await, 1);
}
