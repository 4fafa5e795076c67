//! Between the consumer and the service: credit, answers, lost streams, the end.

use std::collections::VecDeque;
use std::time::Duration;

use handfast_consumer::{Consumer, Report, handfast};
use handfast_proto::v1::{AnswerKind, AnswerOutcome};
use sqlx::Sqlite;
use tonic::Code;

use crate::common::{PATIENCE, World};

#[tokio::test]
async fn a_service_that_is_not_ready_is_waited_for() {
    let world = World::<Sqlite>::new().await;
    world.service.script(|script| {
        script.refuse_streams = VecDeque::from([Code::Unavailable, Code::NotFound, Code::NotFound]);
    });
    world.service.deliver(1, "ok");
    let running = world.start().await;
    world.service.until_answers(1).await;
    assert_eq!(world.stop(running).await.consumed, 1);
}

#[tokio::test]
async fn a_consumer_without_a_service_stops_at_once() {
    let world = World::<Sqlite>::new().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let consumer = Consumer::connect(handfast(address)).await.unwrap();
    let subscriber = consumer
        .subscription("payment.completed", "accounting")
        .inbox(world.pool.clone());
    let running = world.start_with(subscriber);
    assert_eq!(world.stop(running).await, Report::default());
}

#[tokio::test]
async fn an_answer_that_is_lost_is_given_again() {
    let world = World::<Sqlite>::new().await;
    world.service.script(|script| {
        script.refuse_calls = 2;
        script.lose_replies = 1;
    });
    world.service.deliver(1, "ok");
    let running = world.start().await;
    world.service.until_answers(2).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (1, 0));
    world.service.script(|script| {
        assert_eq!(script.words(1), [AnswerKind::Consumed; 2]);
        assert_eq!(script.calls, 4);
    });
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 1));
}

#[tokio::test]
async fn a_consumer_that_ends_before_its_answer_has_one_effect() {
    let world = World::<Sqlite>::new().await;
    world.service.script(|script| script.refuse_calls = 1);
    world.service.deliver(1, "ok");
    let first = world.start().await;
    world.service.until("a call", |s| s.calls == 1).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    world.service.until("no stream", |s| s.credit > 0).await;
    assert_eq!(world.effects(1).await, 1);

    world.service.script(|script| script.credit = 0);
    let second = world.start().await;
    world
        .service
        .until("another stream", |s| s.streams == 2)
        .await;
    world.service.deliver(1, "ok");
    world.service.until_answers(1).await;
    let report = world.stop(second).await;
    assert_eq!((report.consumed, report.duplicates), (0, 1));
    assert_eq!((world.effects(1).await, world.seen(1).await), (1, 2));
}

#[tokio::test]
async fn answers_survive_a_lost_stream() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber().await.prefetch(5).max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    service.deliver_all((1..=3).map(|n| service.delivery(n, "ok")));
    service.until("work", |script| script.sent == 3).await;
    service.cut();
    // What is still in work takes part of the new stream's credit.
    service
        .until("another stream", |s| s.streams == 2 && s.credit == 2)
        .await;
    gate.add_permits(3);
    service.until_answers(3).await;
    service.until("its credit", |s| s.credit == 5).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (3, 0));
}

#[tokio::test]
async fn answers_wait_for_a_service_that_is_away() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let running = world.start().await;
    service.until("a stream", |script| script.credit > 0).await;
    service.script(|script| {
        script.refuse_calls = 3;
        script.refuse_streams = VecDeque::from([Code::Unavailable; 3]);
    });
    service.deliver_all((1..=3).map(|n| service.delivery(n, "ok")));
    service.until("work", |script| script.sent == 3).await;
    service.cut();
    service.until_answers(3).await;
    service.until("another stream", |s| s.streams == 2).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (3, 0));
    assert_eq!(world.all_effects().await, 3);
}

#[tokio::test]
async fn the_prefetch_bounds_what_is_unanswered() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber().await.prefetch(3).max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    service.deliver_all((1..=20).map(|n| service.delivery(n, "ok")));
    service
        .until("full credit", |script| script.sent == 3)
        .await;
    gate.add_permits(20);
    service.until_answers(20).await;
    world.stop(running).await;
    service.script(|script| assert_eq!(script.most_open, 3));
}

#[tokio::test]
async fn a_shutdown_works_off_what_was_delivered_and_takes_nothing_new() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let (handler, gate) = world.gated();
    let subscriber = world.subscriber().await.prefetch(50).max_batch(1);
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    gate.add_permits(1);
    service.deliver(0, "ok");
    service.until_answers(1).await;
    service.deliver_all((1..=5).map(|n| service.delivery(n, "ok")));
    service.until("work", |script| script.sent == 6).await;
    world.shutdown.cancel();
    service
        .until("no credit", |script| script.credit == 0)
        .await;
    service.deliver(6, "ok");
    gate.add_permits(10);
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (6, 0));
    assert_eq!(world.all_effects().await, 6);
    service.script(|script| {
        assert_eq!(script.answers.len(), 6);
        assert_eq!((script.sent, script.streams), (6, 1));
    });
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let world = World::<Sqlite>::new().await;
    let (handler, gate) = world.gated();
    let subscriber = world
        .subscriber()
        .await
        .max_batch(1)
        .drain_deadline(Duration::from_millis(100));
    let running = tokio::spawn(subscriber.run_batch(handler, world.shutdown.clone()));
    gate.add_permits(1);
    world.service.deliver(1, "ok");
    world.service.until_answers(1).await;
    world.service.deliver(2, "ok");
    world.service.until("work", |script| script.sent == 2).await;
    let report = world.stop(running).await;
    assert_eq!((report.consumed, report.unanswered), (1, 1));
    assert_eq!((world.effects(2).await, world.seen(2).await), (0, 0));
}

#[tokio::test]
async fn answers_that_nobody_wants_are_dropped_and_counted() {
    for outcome in [
        AnswerOutcome::NoSuchDelivery,
        AnswerOutcome::Invalid,
        AnswerOutcome::Stale,
    ] {
        let world = World::<Sqlite>::new().await;
        let service = &world.service;
        service.script(|script| script.outcome = Some(outcome));
        let running = world.start_with(world.subscriber().await.prefetch(1));
        service.deliver_all((1..=3).map(|n| service.delivery(n, "ok")));
        service.until_answers(3).await;
        let report = world.stop(running).await;
        let dropped = match outcome {
            AnswerOutcome::NoSuchDelivery => report.no_such_delivery,
            AnswerOutcome::Invalid => report.refused,
            _ => 3,
        };
        assert_eq!((dropped, report.unanswered), (3, 0), "{outcome:?}");
        service.script(|script| assert_eq!(script.calls, 3));
    }
}

#[tokio::test]
async fn one_unreadable_answer_does_not_hold_up_the_others() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    service.script(|script| {
        script.refuse_with = Some(Code::InvalidArgument);
        script.refuse_calls = usize::MAX;
    });
    let running = world.start_with(world.subscriber().await.prefetch(1));
    service.deliver(1, "ok");
    service.until("a refusal", |script| script.calls == 1).await;
    service.script(|script| script.refuse_calls = 0);
    service.deliver(2, "ok");
    service.until_answers(1).await;
    let report = world.stop(running).await;
    assert_eq!((report.refused, report.unanswered), (1, 0));
    service.script(|script| assert_eq!(script.words(2), [AnswerKind::Consumed]));
}

#[tokio::test]
async fn a_delivery_that_cannot_be_read_costs_no_credit() {
    let world = World::<Sqlite>::new().await;
    let service = &world.service;
    let running = world.start_with(world.subscriber().await.prefetch(1));
    let mut broken = service.delivery(1, "ok");
    broken.message_id = vec![1, 2, 3];
    service.deliver_all([broken, service.delivery(2, "ok")]);
    tokio::time::timeout(PATIENCE, service.until_answers(1))
        .await
        .unwrap();
    assert_eq!(world.stop(running).await.consumed, 1);
}
