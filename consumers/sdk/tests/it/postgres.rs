//! What only a database with many writers can get wrong.

use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Consumer, Delivered, InboxDatabase, Tx, handfast};
use handfast_proto::v1::AnswerKind;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, Postgres, Transaction};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::common::{Database as _, PATIENCE, Service, World};

/// A pool whose defaults are as unfit as a program may have them.
async fn careless(world: &World<Postgres>) -> PgPool {
    let options = world.home.options().options([
        ("default_transaction_isolation", "repeatable read"),
        ("synchronous_commit", "off"),
    ]);
    PgPoolOptions::new()
        .after_connect(|connection, _| {
            Box::pin(async move {
                let bound = sqlx::query("SET lock_timeout = '5s'");
                bound.execute(connection).await.map(|_| ())
            })
        })
        .connect_with(options)
        .await
        .unwrap()
}

async fn until(pool: &PgPool, sql: &'static str, wanted: i64) {
    let wait = async { while Postgres::count(pool, sql).await != wanted {} };
    let met = tokio::time::timeout(PATIENCE, wait).await.is_ok();
    assert!(met, "waited in vain: {sql}");
}

const WAITING: &str = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event_type = 'Lock'";

#[tokio::test]
async fn copies_for_two_consumers_at_once_have_one_effect() {
    let world = World::<Postgres>::new().await;
    let other = Service::start(world.now).await;
    let (handler, gate) = world.gated();
    let first = world.subscriber().await;
    let first = tokio::spawn(first.run_batch(handler, world.shutdown.clone()));
    world.service.deliver(1, "ok");
    world.service.until("work", |script| script.sent == 1).await;
    until(
        &world.pool,
        "SELECT count(*) FROM pg_stat_activity
          WHERE datname = current_database() AND state = 'idle in transaction'",
        1,
    )
    .await;

    let second = Consumer::connect(handfast(other.address()))
        .await
        .unwrap()
        .subscription("payment.completed", "accounting")
        .inbox(careless(&world).await);
    let second = tokio::spawn(second.run_batch(world.obedient(), world.shutdown.clone()));
    other.deliver(1, "ok");
    until(&world.pool, WAITING, 1).await;
    gate.add_permits(1);
    other.until_answers(1).await;
    world.service.until_answers(1).await;
    let second = world.stop(second).await;
    let first = world.stop(first).await;
    assert_eq!((first.consumed, second.duplicates), (1, 1));
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 2));
    other.script(|script| assert_eq!(script.words(1), [AnswerKind::Consumed]));
}

#[tokio::test]
async fn the_server_does_not_wait_longer_than_the_consumer() {
    let world = World::<Postgres>::new().await;
    let subscriber = world.subscriber().await;
    let running = world.start_with(subscriber.inbox_wait(Duration::from_millis(200)));
    let lock = Postgres::hold(&world.other_pool().await).await;
    world.service.deliver(1, "ok");
    world.service.until_answers(1).await;
    until(&world.pool, WAITING, 0).await;
    lock.rollback().await.unwrap();
    let report = world.stop(running).await;
    assert_eq!((report.later, world.all_effects().await), (1, 0));
}

#[tokio::test]
async fn no_row_of_a_batch_is_waited_for_longer_than_the_consumer() {
    let world = World::<Postgres>::new().await;
    let service = &world.service;
    let mut other = world.other_pool().await.begin().await.unwrap();
    sqlx::query("INSERT INTO handfast_inbox (subscription, message_id) VALUES ('accounting', $1)")
        .bind(Uuid::from_u128(2))
        .execute(&mut *other)
        .await
        .unwrap();
    service.deliver_all([1, 2].map(|n| service.delivery(n, "ok")));
    let subscriber = world.subscriber().await;
    let running = world.start_with(subscriber.inbox_wait(Duration::from_millis(200)));
    service.until_answers(2).await;
    until(&world.pool, WAITING, 0).await;
    other.rollback().await.unwrap();
    let report = world.stop(running).await;
    assert_eq!((report.later, world.all_effects().await), (2, 0));
}

#[tokio::test]
async fn a_statement_that_waits_beyond_the_time_out_fails_its_messages_and_waits_no_longer() {
    let world = World::<Postgres>::new().await;
    let service = &world.service;
    let mut lock = world.other_pool().await.begin().await.unwrap();
    Postgres::run(&mut lock, "LOCK TABLE effect".to_owned()).await;
    service.deliver_all([1, 2].map(|n| service.delivery(n, "ok")));
    let subscriber = world.subscriber().await;
    let running = world.start_with(subscriber.handler_timeout(Duration::from_millis(200)));
    service.until_answers(2).await;
    until(&world.pool, WAITING, 0).await;
    lock.rollback().await.unwrap();
    let report = world.stop(running).await;
    assert_eq!((report.failed, report.later), (2, 0));
    service.script(|script| {
        for number in [1, 2] {
            assert_eq!(script.words(number), [AnswerKind::Failed]);
            assert_eq!(script.reason(number), "handler exceeded 200 ms");
        }
    });
    assert_eq!((world.seen(1).await, world.seen(2).await), (0, 0));
}

#[tokio::test]
async fn a_stricter_bound_of_the_pool_for_a_statement_stays() {
    struct Asking;
    impl BatchHandler<Postgres> for Asking {
        async fn handle_batch(&self, tx: &mut Tx<Postgres>, new: &[Delivered]) -> Vec<Answer> {
            let bound = sqlx::query_scalar("SELECT current_setting('statement_timeout')");
            let bound: String = bound.fetch_one(tx).await.unwrap();
            vec![Answer::Rejected(bound); new.len()]
        }
    }
    for (pools, wanted) in [("0", "5s"), ("1500", "1500ms"), ("2h", "5s")] {
        let world = World::<Postgres>::new().await;
        let options = world.home.options().options([("statement_timeout", pools)]);
        let pool = PgPoolOptions::new().connect_with(options).await.unwrap();
        let subscriber = Consumer::connect(handfast(world.service.address()))
            .await
            .unwrap()
            .subscription("payment.completed", "accounting")
            .inbox(pool)
            .handler_timeout(Duration::from_secs(5));
        let running = tokio::spawn(subscriber.run_batch(Asking, world.shutdown.clone()));
        world.service.deliver(1, "ok");
        world.service.until_answers(1).await;
        world.stop(running).await;
        let word = world.service.script(|script| script.reason(1));
        assert_eq!(word, wanted, "{pools}");
    }
}

/// Fails message 1 and leaves the inbox locked.
struct Locking {
    pool: PgPool,
    lock: mpsc::Sender<Transaction<'static, Postgres>>,
}

impl BatchHandler<Postgres> for Locking {
    async fn handle_batch(&self, _tx: &mut Tx<Postgres>, new: &[Delivered]) -> Vec<Answer> {
        let (pool, lock) = (self.pool.clone(), self.lock.clone());
        tokio::spawn(async move {
            let mut tx = pool.begin().await.unwrap();
            Postgres::run(&mut tx, "LOCK TABLE handfast_inbox".to_owned()).await;
            lock.send(tx).await.unwrap();
        });
        // It stands before everybody who wants a row after this transaction.
        until(&self.pool, WAITING, 1).await;
        let mut answers = vec![Answer::Consumed; new.len()];
        answers[0] = Answer::failed("no money");
        answers
    }
}

#[tokio::test]
async fn what_failed_in_a_batch_has_failed_also_if_the_inbox_cannot_be_had_again() {
    let world = World::<Postgres>::new().await;
    let service = &world.service;
    let (lock, mut locked) = mpsc::channel(1);
    let pool = world.other_pool().await;
    service.deliver_all([1, 2].map(|n| service.delivery(n, "ok")));
    let subscriber = world.subscriber().await;
    let subscriber = subscriber.inbox_wait(Duration::from_millis(200));
    let handler = Locking { pool, lock };
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    service.until_answers(2).await;
    let report = world.stop(running).await;
    locked.recv().await.unwrap().rollback().await.unwrap();
    assert_eq!((report.failed, report.later), (1, 1));
    service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Failed]);
        assert_eq!(script.reason(1), "no money");
        assert_eq!(script.words(2), [AnswerKind::Later]);
    });
}

#[tokio::test]
async fn a_deferred_trigger_that_refuses_at_commit_is_the_messages_failure() {
    struct Effect;
    impl BatchHandler<Postgres> for Effect {
        async fn handle_batch(&self, tx: &mut Tx<Postgres>, new: &[Delivered]) -> Vec<Answer> {
            for message in new {
                let word = std::str::from_utf8(&message.payload).unwrap();
                let id = message.message_id;
                Postgres::insert_effect(tx, id, word).await.unwrap();
            }
            vec![Answer::Consumed; new.len()]
        }
    }
    let world = World::<Postgres>::new().await;
    world
        .run(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'too much'; END $$;
             CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON effect
                 DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW WHEN (NEW.word = 'refused') EXECUTE FUNCTION refuse()",
        )
        .await;
    let service = &world.service;
    let words = ["ok", "refused", "ok"];
    service.deliver_all((1..).zip(words).map(|(n, word)| service.delivery(n, word)));
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run_batch(Effect, world.shutdown.clone()));
    service.until_answers(words.len()).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.failed), (2, 1));
    service.script(|script| {
        assert_eq!(script.words(2), [AnswerKind::Failed]);
        let reason = script.reason(2);
        assert!(reason.starts_with("cannot commit: "), "{reason}");
        assert!(reason.contains("too much"), "{reason}");
    });
    assert_eq!((world.seen(1).await, world.seen(2).await), (1, 0));
}

#[tokio::test]
async fn an_error_that_the_handler_hides_is_not_taken_for_an_effect() {
    struct Hiding;
    impl BatchHandler<Postgres> for Hiding {
        async fn handle_batch(&self, tx: &mut Tx<Postgres>, new: &[Delivered]) -> Vec<Answer> {
            for message in new {
                let sql = match message.payload.as_ref() {
                    b"ends" => "COMMIT",
                    _ => "INSERT INTO there_is_no_such_table VALUES (1)",
                };
                let _ = sqlx::raw_sql(sql).execute(&mut *tx).await;
            }
            vec![Answer::Consumed; new.len()]
        }
    }
    let world = World::<Postgres>::new().await;
    let subscriber = world.subscriber().await.max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(Hiding, world.shutdown.clone()));
    world.service.deliver(1, "fails");
    world.service.deliver(2, "ends");
    world.service.until_answers(2).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.failed), (0, 2));
    assert_eq!(world.seen(1).await, 0);
    world.service.script(|script| {
        assert!(script.reason(1).starts_with("a statement failed"));
        assert_eq!(script.reason(2), "the handler ended the transaction");
    });
}

#[tokio::test]
async fn a_transaction_is_durable_whatever_the_pools_defaults_are_and_waits_for_locks_as_they_say()
{
    struct Asking;
    impl BatchHandler<Postgres> for Asking {
        async fn handle_batch(&self, tx: &mut Tx<Postgres>, new: &[Delivered]) -> Vec<Answer> {
            let settings: (String, String, String) = sqlx::query_as(
                "SELECT current_setting('synchronous_commit'), current_setting('lock_timeout'),
                        current_setting('transaction_isolation')",
            )
            .fetch_one(tx)
            .await
            .unwrap();
            let (synchronous_commit, lock_timeout, isolation) = settings;
            let text = format!("{synchronous_commit} {lock_timeout} {isolation}");
            vec![Answer::Rejected(text); new.len()]
        }
    }
    let world = World::<Postgres>::new().await;
    let subscriber = Consumer::connect(handfast(world.service.address()))
        .await
        .unwrap()
        .subscription("payment.completed", "accounting")
        .inbox(careless(&world).await);
    let running = tokio::spawn(subscriber.run_batch(Asking, world.shutdown.clone()));
    world.service.deliver(1, "ok");
    world.service.until_answers(1).await;
    world.stop(running).await;
    world
        .service
        .script(|script| assert_eq!(script.reason(1), "on 5s read committed"));
}

#[tokio::test]
async fn pruning_takes_old_rows_of_the_subscription_and_waits_for_nobody() {
    let world = World::<Postgres>::new().await;
    world
        .run(
            "INSERT INTO handfast_inbox (subscription, message_id, at)
             SELECT subscription, gen_random_uuid(), now() - n * interval '1 hour'
               FROM generate_series(1, 30) AS n, unnest('{points,accounting}'::text[]) AS subscription",
        )
        .await;
    let mut other = world.pool.begin().await.unwrap();
    let _held: Uuid = sqlx::query_scalar(
        "SELECT message_id FROM handfast_inbox WHERE subscription = 'points'
          ORDER BY at LIMIT 1 FOR UPDATE",
    )
    .fetch_one(&mut *other)
    .await
    .unwrap();
    let mut db = world.pool.acquire().await.unwrap();
    let ten_hours_ago = world.now - 10 * 3_600 * 1_000_000;
    let mut pruned = Vec::new();
    for _ in 0..3 {
        let rows = Postgres::prune(&mut db, "points", ten_hours_ago, 15).await;
        pruned.push(rows.unwrap());
    }
    other.rollback().await.unwrap();
    // 20 are older, one of them is held.
    assert_eq!(pruned, [15, 4, 0]);
    let left = "SELECT count(*) FROM handfast_inbox WHERE subscription = 'points'";
    assert_eq!(Postgres::count(&world.pool, left).await, 11);
    assert_eq!(
        Postgres::count(&world.pool, "SELECT count(*) FROM handfast_inbox").await,
        41
    );
}
