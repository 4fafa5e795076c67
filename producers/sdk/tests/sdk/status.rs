//! What the status server answers, and what it leaves undecided.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use handfast_producer::proto::v1::{self, CheckRequest, MessageState, VerdictKind};
use handfast_producer::{
    Answer, BusinessStatus, Fence, Message, Outcome, Question, StatusServer, StatusServerError,
};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use uuid::Uuid;

use crate::asking::{Asking, serving};
use crate::world::{World, buy, count, open};

#[tokio::test]
async fn a_committed_business_is_committed() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    world
        .producer
        .transact(&world.pool, Message::new("t"), async |tx| buy(tx, 1).await)
        .await
        .unwrap();
    let id = world.service.state().prepared[0];
    for _ in 0..2 {
        assert_eq!(
            asking.ask(asking.question(id)).await,
            VerdictKind::Committed
        );
    }
}

#[tokio::test]
async fn a_business_that_never_ran_is_rolled_back_for_ever() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    let id = Uuid::now_v7();
    for _ in 0..2 {
        assert_eq!(
            asking.ask(asking.question(id)).await,
            VerdictKind::RolledBack
        );
    }
    assert_eq!(world.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
}

#[tokio::test]
async fn an_open_business_is_in_progress_and_not_harmed() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    let (began, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let (tell, wait) = (began.clone(), go.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, Message::new("t"), async |tx| {
                tell.notify_one();
                wait.notified().await;
                buy(tx, 1).await
            })
            .await
    });
    began.notified().await;
    let id = world.service.state().prepared[0];
    assert_eq!(
        asking.ask(asking.question(id)).await,
        VerdictKind::InProgress
    );
    go.notify_one();
    assert_eq!(buying.await.unwrap().unwrap(), Outcome::Committed(1));
    assert_eq!(
        asking.ask(asking.question(id)).await,
        VerdictKind::Committed
    );
    assert_eq!(
        world.service.message_state(id),
        Some(MessageState::Confirmed)
    );
}

#[tokio::test]
async fn a_call_ends_in_time_and_what_it_did_not_reach_is_in_progress() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    let blocker = world.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let questions = (0..100).map(|_| asking.question(Uuid::now_v7())).collect();
    let began = tokio::time::Instant::now();
    let kinds = asking.ask_all(questions).await;
    assert!(began.elapsed() < Duration::from_secs(3));
    assert_eq!(kinds, vec![VerdictKind::InProgress; 100]);
    blocker.rollback().await.unwrap();
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_no_transaction_open() {
    let world = World::new().await;
    let asking = Asking::about(&world.pool).await;
    let blocker = world.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let questions: Vec<_> = (0..5).map(|_| asking.question(Uuid::now_v7())).collect();
    let mut client = asking.client.clone();
    let call = tokio::time::timeout(
        Duration::from_millis(20),
        client.check(CheckRequest { questions }),
    );
    assert!(call.await.is_err());
    blocker.rollback().await.unwrap();
    world
        .producer
        .transact(&world.pool, Message::new("t"), async |tx| buy(tx, 1).await)
        .await
        .unwrap();
    let mut asking = asking;
    let id = Uuid::now_v7();
    assert_eq!(
        asking.ask(asking.question(id)).await,
        VerdictKind::RolledBack
    );
}

#[tokio::test]
async fn another_databases_fence_is_unknown() {
    let world = World::new().await;
    let other = open(&world.folder, "other.db").await;
    let mut asking = Asking::about(&world.pool).await;
    let foreign = Fence::open(&other).await.unwrap().identity();
    let id = Uuid::now_v7();
    let question = v1::Question {
        fence: foreign.as_bytes().to_vec(),
        ..asking.question(id)
    };
    assert_eq!(asking.ask(question).await, VerdictKind::Unknown);
    let question = v1::Question {
        fence: Vec::new(),
        ..asking.question(id)
    };
    assert_eq!(asking.ask(question).await, VerdictKind::Unknown);
    assert_eq!(world.verdict(id).await, None);
}

#[tokio::test]
async fn every_shard_answers_for_its_own_fence() {
    let world = World::new().await;
    let other = open(&world.folder, "other.db").await;
    let server = StatusServer::new()
        .fence(world.pool.clone())
        .fence(other.clone());
    let mut asking = Asking::about(&world.pool).await;
    let (client, _stop) = serving(server).await;
    asking.client = client;
    let id = Uuid::now_v7();
    let question = v1::Question {
        fence: Fence::open(&other)
            .await
            .unwrap()
            .identity()
            .as_bytes()
            .to_vec(),
        ..asking.question(id)
    };
    assert_eq!(asking.ask(question).await, VerdictKind::RolledBack);
    assert_eq!(world.verdict(id).await, None);
    assert_eq!(
        count(&other, "SELECT count(*) FROM handfast_fence").await,
        1
    );
}

#[tokio::test]
async fn what_is_older_than_the_fence_remembers_is_unknown() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    const DAY_US: i64 = 24 * 60 * 60 * 1_000_000;
    let id = Uuid::now_v7();
    let old = v1::Question {
        prepared_at: asking.now_us - 29 * DAY_US - 60_000_000,
        ..asking.question(id)
    };
    assert_eq!(asking.ask(old).await, VerdictKind::Unknown);
    assert_eq!(world.verdict(id).await, None);
    let young = v1::Question {
        prepared_at: asking.now_us - 29 * DAY_US + 600_000_000,
        ..asking.question(id)
    };
    assert_eq!(asking.ask(young).await, VerdictKind::RolledBack);
}

#[tokio::test]
async fn a_hundred_questions_are_answered_and_more_are_refused() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    let mut questions: Vec<_> = (0..100).map(|_| asking.question(Uuid::now_v7())).collect();
    let kinds = asking.ask_all(questions.clone()).await;
    assert_eq!(kinds, vec![VerdictKind::RolledBack; 100]);
    questions.push(asking.question(Uuid::now_v7()));
    let refused = asking.client.check(CheckRequest { questions }).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn malformed_and_repeated_ids_do_not_spoil_the_others() {
    let world = World::new().await;
    let mut asking = Asking::about(&world.pool).await;
    let good = asking.question(Uuid::now_v7());
    let malformed = v1::Question {
        message_id: vec![1, 2, 3],
        ..good.clone()
    };
    let nil = asking.question(Uuid::nil());
    let request = CheckRequest {
        questions: vec![malformed, good.clone(), nil, good],
    };
    let reply = asking.client.check(request).await.unwrap().into_inner();
    let kinds: Vec<_> = reply.verdicts.iter().map(v1::Verdict::kind).collect();
    assert_eq!(
        kinds,
        [
            VerdictKind::Unknown,
            VerdictKind::RolledBack,
            VerdictKind::Unknown
        ]
    );
}

struct Ledger;

#[async_trait]
impl BusinessStatus for Ledger {
    async fn status(&self, question: Question) -> Answer {
        match question.key.as_deref() {
            Some("paid") => Answer::Committed,
            Some("slow") => std::future::pending().await,
            _ => Answer::Unknown,
        }
    }
}

#[tokio::test]
async fn a_producer_without_a_fence_answers_itself() {
    let world = World::new().await;
    let (client, _stop) = serving(StatusServer::new().answered_by(Ledger)).await;
    let mut asking = Asking::about(&world.pool).await;
    asking.client = client;
    let ask = |key: &str, asking: &Asking| v1::Question {
        fence: Vec::new(),
        key: Some(key.into()),
        ..asking.question(Uuid::now_v7())
    };
    let questions = ["paid", "other", "slow", "paid"].map(|key| ask(key, &asking));
    let kinds = asking.ask_all(questions.to_vec()).await;
    assert_eq!(
        kinds,
        [
            VerdictKind::Committed,
            VerdictKind::Unknown,
            VerdictKind::InProgress,
            VerdictKind::InProgress
        ]
    );
}

#[tokio::test]
async fn an_address_that_is_open_to_all_is_refused() {
    let served = StatusServer::new()
        .serve("0.0.0.0:0".parse().unwrap(), CancellationToken::new())
        .await;
    assert!(
        matches!(served, Err(StatusServerError::NotLoopback { .. })),
        "{served:?}"
    );
    let stopped = CancellationToken::new();
    stopped.cancel();
    StatusServer::new()
        .insecure_listen(true)
        .serve("0.0.0.0:0".parse().unwrap(), stopped)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_taken_port_is_one_clear_error() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let served = StatusServer::new()
        .serve(taken.local_addr().unwrap(), CancellationToken::new())
        .await;
    let error = served.unwrap_err().to_string();
    assert!(error.starts_with("cannot serve status checks on 127.0.0.1:"));
    assert!(!error.contains('\n'));
}

#[tokio::test]
async fn pruning_removes_what_is_old_and_nothing_else() {
    let world = World::new().await;
    sqlx::query(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)
         INSERT INTO handfast_fence SELECT randomblob(16), 'COMMITTED', i FROM n",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    let fence = Fence::open(&world.pool).await.unwrap();
    let young = Uuid::now_v7();
    fence.settle(young).await.unwrap();
    let removed = fence.prune(Duration::from_secs(60)).await.unwrap();
    assert_eq!(removed, 2_500);
    assert!(world.verdict(young).await.is_some());
}
