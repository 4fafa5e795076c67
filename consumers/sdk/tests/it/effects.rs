//! A message's effect happens once, and only with its inbox row.

use std::time::Duration;

use handfast_consumer::{Answer, BatchHandler, Delivered, Tx};
use handfast_proto::v1::AnswerKind;

use crate::common::{Database, World, on_every_database};

on_every_database! {
    a_batch_commits_together_and_is_answered,
    one_bad_message_does_not_keep_its_batch_from_being_applied_once,
    a_time_out_leaves_no_inbox_row_and_no_open_transaction,
    one_message_per_transaction_works_alike,
    an_inbox_hit_answers_consumed_again,
    the_same_message_twice_at_once_is_applied_once,
    what_is_older_than_the_inbox_remembers_is_rejected,
    a_database_that_cannot_begin_is_answered_later,
    what_came_back_unanswered_runs_alone,
    a_wrong_number_of_answers_commits_nothing,
    a_rule_that_fails_at_commit_is_the_messages_failure,
}

async fn a_batch_commits_together_and_is_answered<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    service.deliver_all((1..=50).map(|n| service.delivery(n, "ok")));
    let running = world.start().await;
    service.until_answers(50).await;
    let report = world.stop(running).await;
    assert_eq!(world.all_effects().await, 50);
    assert_eq!((report.consumed, report.unanswered), (50, 0));
    assert_eq!(world.batches.lock().unwrap().len(), 1);
    service.script(|script| {
        for answer in &script.answers {
            assert_eq!(answer.kind(), AnswerKind::Consumed);
            assert_eq!(answer.generation, 1);
            assert_eq!(answer.sent_at, service.delivery(1, "ok").sent_at);
        }
    });
}

async fn one_bad_message_does_not_keep_its_batch_from_being_applied_once<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    let words = ["ok", "fail", "ok", "later", "reject", "panic", "ok"];
    service.deliver_all((1..).zip(words).map(|(n, word)| service.delivery(n, word)));
    let running = world.start().await;
    service.until_answers(words.len()).await;
    let report = world.stop(running).await;
    for (number, word) in (1..).zip(words) {
        let applied = i64::from(word == "ok");
        assert_eq!(world.effects(number).await, applied, "{number} {word}");
        assert_eq!(world.seen(number).await, applied, "{number} {word}");
    }
    service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Consumed]);
        assert_eq!(script.words(2), [AnswerKind::Failed]);
        assert_eq!(script.reason(2), "told to fail");
        assert_eq!(script.words(4), [AnswerKind::Later]);
        assert_eq!(script.words(5), [AnswerKind::Rejected]);
        assert_eq!(script.reason(5), "told to reject");
        assert_eq!(script.words(6), [AnswerKind::Failed]);
        assert_eq!(script.reason(6), "handler panicked: told to panic");
        let later = script.answers.iter().find(|a| a.later_ms > 0).unwrap();
        assert_eq!(later.later_ms, 1_500);
    });
    assert_eq!(
        (
            report.consumed,
            report.failed,
            report.later,
            report.rejected
        ),
        (3, 2, 1, 1)
    );
}

async fn a_time_out_leaves_no_inbox_row_and_no_open_transaction<D: Database>() {
    let world = World::<D>::new().await;
    world.service.deliver(1, "hang");
    let subscriber = world.subscriber().await;
    let running = world.start_with(subscriber.handler_timeout(Duration::from_millis(100)));
    world.service.until_answers(1).await;
    // A transaction that was left open would keep the next one from beginning.
    world.service.deliver(2, "ok");
    world.service.until_answers(2).await;
    world.stop(running).await;
    world.service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Failed]);
        assert_eq!(script.reason(1), "handler exceeded 100 ms");
        assert_eq!(script.words(2), [AnswerKind::Consumed]);
    });
    assert_eq!((world.effects(1).await, world.seen(1).await), (0, 0));
}

async fn one_message_per_transaction_works_alike<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    service.deliver_all([service.delivery(1, "ok"), service.delivery(2, "panic")]);
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run(world.obedient(), world.shutdown.clone()));
    service.until_answers(2).await;
    service.deliver(1, "ok");
    service.until_answers(3).await;
    let report = world.stop(running).await;
    assert_eq!(
        (report.consumed, report.duplicates, report.failed),
        (1, 1, 1)
    );
    assert_eq!((world.effects(1).await, world.effects(2).await), (1, 0));
}

async fn an_inbox_hit_answers_consumed_again<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    let running = world.start().await;
    service.deliver(1, "ok");
    service.until_answers(1).await;
    // New and known messages share a batch.
    service.deliver_all([service.delivery(1, "ok"), service.delivery(2, "ok")]);
    service.until_answers(3).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.duplicates), (2, 1));
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 2));
    assert_eq!((world.effects(2).await, world.seen(2).await), (1, 1));
    service.script(|script| assert_eq!(script.words(1), [AnswerKind::Consumed; 2]));
}

async fn the_same_message_twice_at_once_is_applied_once<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    service.deliver_all([1, 2, 1, 1].map(|n| service.delivery(n, "ok")));
    let running = world.start().await;
    service.until_answers(4).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.duplicates), (2, 2));
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 3));
}

async fn what_is_older_than_the_inbox_remembers_is_rejected<D: Database>() {
    const DAY_US: i64 = 24 * 3600 * 1_000_000;
    let world = World::<D>::new().await;
    let service = &world.service;
    let aged = |number, days| {
        let mut delivery = service.delivery(number, "ok");
        delivery.first_sent_at -= days * DAY_US;
        delivery
    };
    let running = world.start().await;
    service.deliver(1, "ok");
    service.until_answers(1).await;
    // The default retention of 7 days, less one.
    service.deliver_all([aged(1, 30), aged(2, 7), aged(3, 5)]);
    service.until_answers(4).await;
    let report = world.stop(running).await;
    service.script(|script| {
        assert_eq!(
            script.words(1),
            [AnswerKind::Consumed; 2],
            "it is in the inbox"
        );
        assert_eq!(script.words(2), [AnswerKind::Rejected]);
        assert_eq!(script.reason(2), "older than the inbox remembers");
        assert_eq!(script.words(3), [AnswerKind::Consumed]);
    });
    assert_eq!((world.effects(2).await, world.seen(2).await), (0, 0));
    assert_eq!(
        (report.consumed, report.duplicates, report.rejected),
        (2, 1, 1)
    );
}

async fn a_database_that_cannot_begin_is_answered_later<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    let subscriber = world.subscriber().await;
    let running = world.start_with(subscriber.inbox_wait(Duration::from_millis(200)));
    service.until("a stream", |script| script.credit > 0).await;

    let other = world.other_pool().await;
    let lock = D::hold(&other).await;
    service.deliver_all([1, 2, 3].map(|n| service.delivery(n, "ok")));
    service.until_answers(3).await;
    lock.rollback().await.unwrap();
    service.script(|script| {
        for answer in &script.answers {
            assert_eq!(answer.kind(), AnswerKind::Later);
            assert_eq!(answer.later_ms, 1_000);
        }
    });

    // The begin that was given up has not left a transaction behind.
    let mut asked = 3;
    while world.all_effects().await < 1 {
        service.deliver(1, "ok");
        asked += 1;
        service.until_answers(asked).await;
    }
    let report = world.stop(running).await;
    assert_eq!(report.consumed, 1);
    assert_eq!(world.effects(1).await, 1);
}

async fn what_came_back_unanswered_runs_alone<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    let mut alone = service.delivery(2, "ok");
    alone.alone = true;
    service.deliver_all([service.delivery(1, "ok"), alone, service.delivery(3, "ok")]);
    let running = world.start().await;
    service.until_answers(3).await;
    world.stop(running).await;
    assert_eq!(*world.batches.lock().unwrap(), [vec![1, 3], vec![2]]);
    service.script(|script| {
        let order: Vec<_> = script.answers.iter().map(|a| a.message_id[15]).collect();
        assert_eq!(order, [1, 3, 2]);
    });
}

struct Miscounting;

impl<D: Database> BatchHandler<D> for Miscounting {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        D::insert_effect(tx, messages[0].message_id, "miscounted")
            .await
            .unwrap();
        vec![Answer::Consumed; messages.len() + 1]
    }
}

async fn a_wrong_number_of_answers_commits_nothing<D: Database>() {
    let world = World::<D>::new().await;
    let service = &world.service;
    service.deliver_all([1, 2].map(|n| service.delivery(n, "ok")));
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run_batch(Miscounting, world.shutdown.clone()));
    service.until_answers(2).await;
    world.stop(running).await;
    assert_eq!(world.all_effects().await, 0);
    service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Failed]);
        assert_eq!(
            script.reason(1),
            "the handler gave 2 answers for 1 messages"
        );
    });
}

async fn a_rule_that_fails_at_commit_is_the_messages_failure<D: Database>() {
    struct Orphan;
    impl<D: Database> BatchHandler<D> for Orphan {
        async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
            for message in messages {
                if message.payload.as_ref() == b"fail" {
                    D::run(tx, "INSERT INTO child (parent) VALUES (404)".to_owned()).await;
                }
            }
            vec![Answer::Consumed; messages.len()]
        }
    }
    let world = World::<D>::new().await;
    world
        .run(
            "CREATE TABLE parent (id INTEGER PRIMARY KEY);
             CREATE TABLE child (
                 parent INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)",
        )
        .await;
    let service = &world.service;
    service.deliver_all([service.delivery(1, "ok"), service.delivery(2, "fail")]);
    let subscriber = world.subscriber().await;
    let running = tokio::spawn(subscriber.run_batch(Orphan, world.shutdown.clone()));
    service.until_answers(2).await;
    world.stop(running).await;
    service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Consumed]);
        assert_eq!(script.words(2), [AnswerKind::Failed]);
        assert!(script.reason(2).starts_with("cannot commit: "));
    });
    assert_eq!((world.seen(1).await, world.seen(2).await), (1, 0));
}
