//! The message and its business happen together or not at all, whatever is lost on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::scripted::{Fault, Scripted};
use crate::world::{World, buy, count, message, open, options};
use handfast_producer::proto::v1::MessageState;
use handfast_producer::{Fence, FenceError, Outcome, Producer, Settled, TransactError, Tx};
use sqlx::{Connection as _, Sqlite, SqliteConnection, SqlitePool};
use tokio::sync::Notify;
use tonic::Code;
use uuid::Uuid;

#[tokio::test]
async fn a_commit_confirms_its_message() {
    let world = World::new().await;
    let mut id = Uuid::nil();
    let bought = world
        .producer
        .transact(&world.pool, message(), async |tx| {
            id = tx.message_id();
            buy(tx, 42).await
        })
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert_eq!(world.orders().await, 1);
    assert_eq!(world.verdict(id).await.as_deref(), Some("COMMITTED"));
    assert_eq!(
        world.service.message_state(id),
        Some(MessageState::Confirmed)
    );
    let fence = Fence::open(&world.pool).await.unwrap().identity();
    let kept = world.service.state().messages[&id].message.clone();
    assert_eq!(kept.fence, fence.as_bytes());
    assert_eq!(&kept.payload[..], b"42");
}

#[tokio::test]
async fn transact_runs_in_a_spawned_task() {
    let world = World::new().await;
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let bought = tokio::spawn(async move {
        let order = String::from("42");
        producer
            .transact(&pool, message(), async |tx: &mut Tx<Sqlite>| {
                sqlx::query("INSERT INTO orders (id) VALUES (?)")
                    .bind(&order)
                    .execute(&mut **tx)
                    .await
            })
            .await
            .is_ok()
    });
    assert!(bought.await.unwrap());
    assert_eq!(world.orders().await, 1);
}

#[tokio::test]
async fn a_lost_confirm_still_returns_committed() {
    let world = World::new().await;
    world
        .service
        .script("confirm", vec![Fault::Fail(Code::Unavailable); 100]);
    let producer = world
        .producer
        .clone()
        .with_confirm_budget(Duration::from_millis(100));
    let bought = producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Prepared]);
    let id = world.service.state().prepared[0];
    let fence = Fence::open(&world.pool).await.unwrap();
    assert_eq!(fence.settle(id).await.unwrap(), Settled::Committed);
}

#[tokio::test]
async fn a_confirm_whose_reply_is_lost_is_repeated() {
    let world = World::new().await;
    world.service.script("confirm", [Fault::LoseReply]);
    world.service.script("prepare", [Fault::LoseReply]);
    world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap();
    world.producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Confirmed]);
    assert_eq!(world.service.calls("confirm").len(), 2);
    assert_eq!(world.service.state().prepared.len(), 1);
}

#[tokio::test]
async fn a_confirm_goes_on_behind_a_caller_that_does_not_wait() {
    let world = World::new().await;
    let go = Arc::new(Notify::new());
    world.service.script("confirm", [Fault::Wait(go.clone())]);
    let bought = world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert_eq!(world.service.states(), [MessageState::Prepared]);
    go.notify_one();
    world.producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Confirmed]);
}

#[tokio::test]
async fn a_confirm_that_is_not_found_is_published_under_the_same_id() {
    let world = World::new().await;
    world.service.script("confirm", [Fault::Forget]);
    let mut id = Uuid::nil();
    world
        .producer
        .transact(&world.pool, message(), async |tx| {
            id = tx.message_id();
            buy(tx, 42).await
        })
        .await
        .unwrap();
    world.producer.drain().await;
    assert_eq!(
        world.service.message_state(id),
        Some(MessageState::Confirmed)
    );
    assert_eq!(world.service.calls("publish"), [1]);
    assert_eq!(
        &world.service.state().messages[&id].message.payload[..],
        b"42"
    );
}

#[tokio::test]
async fn a_refused_confirm_still_returns_committed() {
    let world = World::new().await;
    world
        .service
        .script("confirm", [Fault::RefuseItems(Code::FailedPrecondition)]);
    let bought = world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert_eq!(world.service.calls("confirm"), [1]);
}

#[tokio::test]
async fn a_business_error_is_fenced_and_cancelled() {
    let world = World::new().await;
    let mut id = Uuid::nil();
    let failed = world
        .producer
        .transact(&world.pool, message(), async |tx| {
            id = tx.message_id();
            buy(tx, 42).await.unwrap();
            Err::<(), _>("no")
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Business("no")), "{failed}");
    assert_eq!(world.orders().await, 0);
    assert_eq!(world.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
    assert_eq!(
        world.service.message_state(id),
        Some(MessageState::Cancelled)
    );
}

#[tokio::test]
async fn a_business_error_is_returned_though_the_cancel_is_lost() {
    let world = World::new().await;
    world
        .service
        .script("cancel", vec![Fault::Fail(Code::Unavailable); 100]);
    let producer = world
        .producer
        .clone()
        .with_confirm_budget(Duration::from_millis(100));
    let failed = producer
        .transact(&world.pool, message(), async |_| Err::<(), _>("no"))
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Business("no")), "{failed}");
    producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Prepared]);
}

#[tokio::test]
async fn a_future_dropped_before_commit_is_a_rollback() {
    let world = World::new().await;
    let began = Arc::new(Notify::new());
    let (producer, pool, tell) = (world.producer.clone(), world.pool.clone(), began.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message(), async |tx| {
                buy(tx, 42).await?;
                tell.notify_one();
                std::future::pending::<Result<(), sqlx::Error>>().await
            })
            .await
    });
    began.notified().await;
    buying.abort();
    drop(buying.await);
    // The rollback is queued before the connection serves anybody again.
    let fence = Fence::open(&world.pool).await.unwrap();
    let id = world.service.state().prepared[0];
    assert_eq!(fence.settle(id).await.unwrap(), Settled::RolledBack);
    assert_eq!(world.orders().await, 0);
}

#[tokio::test]
async fn a_future_dropped_after_commit_changes_nothing() {
    let world = World::new().await;
    let go = Arc::new(Notify::new());
    world.service.script("confirm", [Fault::Wait(go.clone())]);
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message(), async |tx| buy(tx, 42).await)
            .await
    });
    // The confirm is called only after the commit.
    world
        .service
        .until("a confirm", |state| {
            state.calls.iter().any(|(verb, _)| *verb == "confirm")
        })
        .await;
    buying.abort();
    drop(buying.await);
    go.notify_one();
    world.producer.drain().await;
    assert_eq!(world.orders().await, 1);
    assert_eq!(world.service.states(), [MessageState::Confirmed]);
}

#[tokio::test]
async fn a_panic_in_the_business_is_a_rollback() {
    let world = World::new().await;
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message(), async |tx| -> Result<(), sqlx::Error> {
                buy(tx, 42).await?;
                panic!("as told")
            })
            .await
    });
    assert!(buying.await.unwrap_err().is_panic());
    assert_eq!(world.orders().await, 0);
    world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 43).await)
        .await
        .unwrap();
    assert_eq!(world.orders().await, 1);
}

/// A producer whose prepare waits, and the id that it then has prepared.
async fn prepare_held_up(world: &World) -> (Arc<Notify>, Fence<Sqlite>) {
    let go = Arc::new(Notify::new());
    world.service.script("prepare", [Fault::Wait(go.clone())]);
    (go, Fence::open(&world.pool).await.unwrap())
}

#[tokio::test]
async fn a_try_that_was_cancelled_before_its_prepare_returned_starts_again() {
    let world = World::new().await;
    world.service.script("prepare", [Fault::CancelAndLoseReply]);
    let bought = world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    let prepared = world.service.state().prepared.clone();
    assert_eq!(prepared.len(), 2);
    assert_eq!(
        world.service.message_state(prepared[1]),
        Some(MessageState::Confirmed)
    );
}

#[tokio::test]
async fn a_third_cancelled_try_is_the_last() {
    let world = World::new().await;
    world.service.script("prepare", [Fault::CancelAndLoseReply]);
    // Each try takes two calls: the one whose reply is lost, and its repetition.
    for _ in 0..2 {
        world
            .service
            .script("prepare", [Fault::Wait(ready()), Fault::CancelAndLoseReply]);
    }
    let runs = AtomicU32::new(0);
    let failed = world
        .producer
        .transact(&world.pool, message(), async |tx| {
            runs.fetch_add(1, Ordering::SeqCst);
            buy(tx, 42).await
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Fenced { .. }), "{failed}");
    assert_eq!(runs.load(Ordering::SeqCst), 0);
    assert_eq!(world.service.state().prepared.len(), 3);
    assert_eq!(world.orders().await, 0);
}

/// Somebody who does not have to be waited for.
fn ready() -> Arc<Notify> {
    let notify = Arc::new(Notify::new());
    notify.notify_one();
    notify
}

#[tokio::test]
async fn a_check_between_prepare_and_begin_makes_a_new_id() {
    let world = World::new().await;
    let (go, fence) = prepare_held_up(&world).await;
    // Everybody waits for the only writer, so the check comes before the begin.
    let mut blocker = world.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message(), async |tx| buy(tx, 42).await)
            .await
    });
    world
        .service
        .until("a prepare", |state| !state.calls.is_empty())
        .await;
    go.notify_one();
    world
        .service
        .until("a message", |state| state.prepared.len() == 1)
        .await;
    let id = world.service.state().prepared[0];
    // What a check would do, in the transaction that is ahead of the business.
    sqlx::query(
        "INSERT INTO handfast_fence (message_id, verdict, at) VALUES (?, 'ROLLED_BACK', 0)",
    )
    .bind(&id.as_bytes()[..])
    .execute(&mut *blocker)
    .await
    .unwrap();
    blocker.commit().await.unwrap();
    assert_eq!(fence.settle(id).await.unwrap(), Settled::RolledBack);
    let bought = buying.await.unwrap().unwrap();
    assert_eq!(bought, Outcome::Committed(42));
    assert_eq!(world.orders().await, 1);
    let prepared = world.service.state().prepared.clone();
    assert_eq!(prepared.len(), 2);
    assert_eq!(
        world.verdict(prepared[1]).await.as_deref(),
        Some("COMMITTED")
    );
}

#[tokio::test]
async fn a_failed_commit_that_the_fence_calls_rolled_back_is_cancelled() {
    let world = World::new().await;
    let failed = world
        .producer
        .transact(&world.pool, message(), async |tx| {
            // No such shop: the constraint is looked at by COMMIT.
            sqlx::query("INSERT INTO deferred (shop) VALUES (7)")
                .execute(&mut **tx)
                .await
        })
        .await
        .unwrap_err();
    assert!(matches!(failed, TransactError::Commit { .. }), "{failed}");
    world.producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Cancelled]);
    assert_eq!(count(&world.pool, "SELECT count(*) FROM deferred").await, 0);
}

#[tokio::test]
async fn a_failed_commit_that_nobody_can_explain_is_never_cancelled() {
    let world = World::new().await;
    // Connections that fail at once when the lock is taken, so that another can slip in.
    let pool = SqlitePool::connect_with(
        options(&world.folder, "orders.db").busy_timeout(Duration::from_millis(1)),
    )
    .await
    .unwrap();
    let mut other = SqliteConnection::connect_with(&options(&world.folder, "orders.db"))
        .await
        .unwrap();
    let failed = world
        .producer
        .transact(&pool, message(), async |tx| {
            // After this the connection is outside any transaction, so COMMIT fails.
            sqlx::query("INSERT INTO deferred (shop) VALUES (7)")
                .execute(&mut **tx)
                .await?;
            sqlx::query("ROLLBACK").execute(&mut **tx).await?;
            sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await?;
            Ok::<_, sqlx::Error>(())
        })
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::OutcomeUnknown { .. }),
        "{failed}"
    );
    world.producer.drain().await;
    assert_eq!(world.service.states(), [MessageState::Prepared]);
    assert!(world.service.calls("cancel").is_empty());
}

#[tokio::test]
async fn a_key_of_a_confirmed_message_is_already_committed() {
    let world = World::new().await;
    world
        .service
        .hold("order.paid", "42", MessageState::Confirmed);
    let runs = AtomicU32::new(0);
    let bought = world
        .producer
        .transact(&world.pool, message().key("42"), async |tx| {
            runs.fetch_add(1, Ordering::SeqCst);
            buy(tx, 42).await
        })
        .await
        .unwrap();
    assert_eq!(bought, Outcome::AlreadyCommitted);
    assert_eq!(runs.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_key_of_a_prepared_message_is_waited_for() {
    let world = World::new().await;
    let holder = world
        .service
        .hold("order.paid", "42", MessageState::Prepared);
    let (producer, pool) = (world.producer.clone(), world.pool.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message().key("42"), async |tx| buy(tx, 42).await)
            .await
    });
    world
        .service
        .until("repeated prepares", |state| state.calls.len() >= 3)
        .await;
    world.service.set(holder, MessageState::Cancelled);
    assert_eq!(buying.await.unwrap().unwrap(), Outcome::Committed(42));
}

#[tokio::test]
async fn a_key_that_stays_undecided_ends_with_the_deadline() {
    let world = World::new().await;
    let held = world
        .service
        .hold("order.paid", "42", MessageState::Prepared);
    let producer = world
        .producer
        .clone()
        .with_deadline(Duration::from_millis(200));
    let failed = producer
        .transact(&world.pool, message().key("42"), async |tx| {
            buy(tx, 42).await
        })
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::HolderUndecided { holder } if holder == held),
        "{failed}"
    );
    assert_eq!(world.orders().await, 0);
}

#[tokio::test]
async fn what_is_refused_is_not_repeated() {
    let world = World::new().await;
    world
        .service
        .script("prepare", [Fault::RefuseItems(Code::InvalidArgument)]);
    let failed = world
        .producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap_err();
    let TransactError::Refused { refusal, .. } = failed else {
        panic!("{failed}");
    };
    assert_eq!(refusal.code, Code::InvalidArgument);
    assert_eq!(world.service.calls("prepare"), [1]);
    assert_eq!(world.orders().await, 0);
}

#[tokio::test]
async fn an_unreachable_service_is_tried_until_the_deadline() {
    let world = World::new().await;
    let producer = Producer::connect("http://127.0.0.1:1", "orders")
        .await
        .unwrap()
        .with_deadline(Duration::from_millis(200));
    let failed = producer
        .transact(&world.pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::Unavailable { .. }),
        "{failed}"
    );
    assert_eq!(world.orders().await, 0);
}

#[tokio::test]
async fn a_service_that_starts_later_is_found() {
    let world = World::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let producer = Producer::connect(format!("http://{address}"), "orders")
        .await
        .unwrap();
    let (caller, pool) = (producer.clone(), world.pool.clone());
    let buying = tokio::spawn(async move {
        caller
            .transact(&pool, message(), async |tx| buy(tx, 42).await)
            .await
    });
    // It has met the closed port at least once when a call of its own has.
    let refused = producer
        .with_deadline(Duration::from_millis(50))
        .get(Uuid::now_v7())
        .await;
    assert!(refused.is_err());
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let late = Scripted::start_on(listener);
    assert_eq!(buying.await.unwrap().unwrap(), Outcome::Committed(42));
    assert_eq!(late.states(), [MessageState::Confirmed]);
}

#[tokio::test]
async fn a_database_that_is_not_durable_is_refused() {
    let world = World::new().await;
    let weak =
        options(&world.folder, "orders.db").synchronous(sqlx::sqlite::SqliteSynchronous::Normal);
    let pool = SqlitePool::connect_with(weak).await.unwrap();
    let failed = world
        .producer
        .transact(&pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::Fence(FenceError::NotDurable { .. })),
        "{failed}"
    );
    assert!(world.service.state().calls.is_empty());
}

#[tokio::test]
async fn a_database_without_a_fence_is_refused() {
    let world = World::new().await;
    let pool = SqlitePool::connect_with(options(&world.folder, "bare.db"))
        .await
        .unwrap();
    let failed = world
        .producer
        .transact(&pool, message(), async |tx| buy(tx, 42).await)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, TransactError::Fence(FenceError::Missing { .. })),
        "{failed}"
    );
}

#[tokio::test]
async fn each_pool_is_known_by_its_own_fence() {
    let world = World::new().await;
    let other = open(&world.folder, "other.db").await;
    for pool in [&world.pool, &other, &world.pool] {
        world
            .producer
            .transact(pool, message(), async |tx| buy(tx, 42).await)
            .await
            .unwrap();
    }
    let fences = [
        Fence::open(&world.pool).await.unwrap().identity(),
        Fence::open(&other).await.unwrap().identity(),
    ];
    let state = world.service.state();
    let sent: Vec<_> = state
        .prepared
        .iter()
        .map(|id| state.messages[id].message.fence.clone())
        .collect();
    assert_eq!(sent[0], fences[0].as_bytes());
    assert_eq!(sent[1], fences[1].as_bytes());
    assert_eq!(sent[2], fences[0].as_bytes());
}
