//! Every way in which a business transaction and a check can meet.

use std::sync::Arc;
use std::time::Duration;

use handfast_producer::proto::v1::{self, MessageState, VerdictKind};
use handfast_producer::{Fence, Outcome, StatusServer, TransactError};
use sqlx::{AssertSqlSafe, Connection as _, PgPool};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use uuid::Uuid;

use super::{LEVELS, Shop, buy, message, pool};
use crate::asking::{Asking, serving};

type Bought = Result<Outcome<i64>, TransactError<sqlx::Error>>;

/// A business that stands still inside of its transaction.
struct Standing {
    id: Uuid,
    go: Arc<Notify>,
    buying: JoinHandle<Bought>,
}

impl Standing {
    /// `ends` is what the closure returns after it was let go.
    async fn begin(shop: &Shop, ends: Result<i64, sqlx::Error>) -> Self {
        let (began, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (producer, pool) = (shop.producer.clone(), shop.pool.clone());
        let (tell, wait) = (began.clone(), go.clone());
        let buying = tokio::spawn(async move {
            producer
                .transact(&pool, message(), async |tx| {
                    buy(tx, 42).await?;
                    tell.notify_one();
                    wait.notified().await;
                    ends
                })
                .await
        });
        began.notified().await;
        let id = *shop.service.state().prepared.last().unwrap();
        Self { id, go, buying }
    }

    async fn end(self) -> Bought {
        self.go.notify_one();
        self.buying.await.unwrap()
    }
}

/// A business that is prepared, while its pool has no connection left for it.
async fn prepared_but_not_begun(shop: &Shop, pool: &PgPool) -> (Uuid, JoinHandle<Bought>) {
    let (producer, pool) = (shop.producer.clone(), pool.clone());
    let buying = tokio::spawn(async move {
        producer
            .transact(&pool, message(), async |tx| buy(tx, 42).await)
            .await
    });
    shop.service
        .until("a prepare", |state| !state.prepared.is_empty())
        .await;
    let id = shop.service.state().prepared[0];
    (id, buying)
}

#[tokio::test]
async fn a_check_before_the_fence_row_makes_a_new_id() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let mut asking = Asking::about(&shop.pool).await;
        let narrow = pool(shop.scratch.options(), 1);
        // The identity is read before the pool is used up.
        Fence::open(&narrow).await.unwrap();
        warm_up(&shop, &narrow).await;
        let taken = narrow.acquire().await.unwrap();
        let (id, buying) = prepared_but_not_begun(&shop, &narrow).await;
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::RolledBack, "{level}");
        drop(taken);
        assert_eq!(buying.await.unwrap().unwrap(), Outcome::Committed(42));
        let prepared = shop.service.state().prepared.clone();
        assert_eq!(prepared.len(), 2);
        assert_eq!(shop.orders().await, 1);
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::RolledBack);
        let kind = asking.ask(asking.question(prepared[1])).await;
        assert_eq!(kind, VerdictKind::Committed);
    }
}

/// Lets the producer read the identity of a pool, and forgets the message of that.
async fn warm_up(shop: &Shop, pool: &PgPool) {
    let failed = shop
        .producer
        .transact(pool, message(), async |_| {
            Err::<(), _>("only to know the pool")
        })
        .await;
    assert!(failed.is_err());
    shop.producer.drain().await;
    shop.service.state().prepared.clear();
}

#[tokio::test]
async fn an_open_business_is_in_progress_and_then_what_became_of_it() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let mut asking = Asking::about(&shop.pool).await;
        let business = Standing::begin(&shop, Ok(42)).await;
        let id = business.id;
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::InProgress, "{level}");
        assert_eq!(business.end().await.unwrap(), Outcome::Committed(42));
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::Committed);

        let business = Standing::begin(&shop, Err(sqlx::Error::RowNotFound)).await;
        let id = business.id;
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::InProgress, "{level}");
        let failed = business.end().await.unwrap_err();
        assert!(matches!(failed, TransactError::Business(_)), "{failed}");
        let kind = asking.ask(asking.question(id)).await;
        assert_eq!(kind, VerdictKind::RolledBack);
        assert_eq!(shop.orders().await, 1);
    }
}

#[tokio::test]
async fn a_check_that_waited_reads_what_was_committed_meanwhile() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let asking = Asking::about(&shop.pool).await;
        // A check that waits too long on a busy machine is IN_PROGRESS, so it may take rounds.
        let ends = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < ends, "no check was answered in time");
            let business = Standing::begin(&shop, Ok(42)).await;
            let mut asking = asking.clone();
            let question = asking.question(business.id);
            let asked = tokio::spawn(async move { asking.ask(question).await });
            shop.until_somebody_waits().await;
            business.end().await.unwrap();
            match asked.await.unwrap() {
                VerdictKind::InProgress => {}
                kind => {
                    assert_eq!(kind, VerdictKind::Committed, "{level}");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_business_waits_for_a_check_and_goes_by_what_it_did() {
    for level in LEVELS {
        for check in ["COMMIT", "ROLLBACK"] {
            let shop = Shop::at(level).await;
            let narrow = pool(shop.scratch.options(), 1);
            warm_up(&shop, &narrow).await;
            let taken = narrow.acquire().await.unwrap();
            let (id, buying) = prepared_but_not_begun(&shop, &narrow).await;
            // A check that has inserted its row and not committed yet.
            let mut checking = shop.connection().await;
            sqlx::raw_sql("BEGIN ISOLATION LEVEL READ COMMITTED")
                .execute(&mut checking)
                .await
                .unwrap();
            sqlx::query("INSERT INTO handfast_fence VALUES ($1, 'ROLLED_BACK')")
                .bind(id)
                .execute(&mut checking)
                .await
                .unwrap();
            drop(taken);
            shop.until_somebody_waits().await;
            sqlx::raw_sql(check).execute(&mut checking).await.unwrap();
            assert_eq!(buying.await.unwrap().unwrap(), Outcome::Committed(42));
            let tries = shop.service.state().prepared.len();
            assert_eq!(tries, if check == "COMMIT" { 2 } else { 1 }, "{level}");
            assert_eq!(shop.orders().await, 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_and_businesses_that_race_agree() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let mut asking = Asking::about(&shop.pool).await;
        let mut buying = JoinSet::new();
        for order in 0..60_i64 {
            let (producer, pool) = (shop.producer.clone(), shop.pool.clone());
            buying.spawn(async move {
                let fails = order % 4 == 0;
                let bought = producer.transact(&pool, message(), async |tx| {
                    let id = tx.message_id();
                    buy(tx, order).await?;
                    if fails {
                        return Err(sqlx::Error::RowNotFound);
                    }
                    Ok(id)
                });
                bought.await
            });
        }
        // Every message is asked about again and again, from before its business begins.
        let mut first = std::collections::HashMap::new();
        let mut committed = Vec::new();
        while !buying.is_empty() {
            let ids = shop.service.state().prepared.clone();
            let asked: Vec<_> = ids.into_iter().rev().take(100).collect();
            let questions = asked.iter().map(|id| asking.question(*id)).collect();
            for (id, kind) in asked.into_iter().zip(asking.ask_all(questions).await) {
                if matches!(kind, VerdictKind::Committed | VerdictKind::RolledBack) {
                    assert_eq!(
                        *first.entry(id).or_insert(kind),
                        kind,
                        "a verdict has changed"
                    );
                }
            }
            while let Some(bought) = buying.try_join_next() {
                match bought.unwrap() {
                    Ok(Outcome::Committed(id)) => committed.push(id),
                    Ok(Outcome::AlreadyCommitted) => panic!("no message has a key"),
                    Err(TransactError::Business(_) | TransactError::Fenced { .. }) => {}
                    Err(error) => panic!("{level}: {error}"),
                }
            }
        }
        shop.producer.drain().await;
        assert_eq!(shop.orders().await, committed.len() as i64);
        let prepared = shop.service.state().prepared.clone();
        for id in prepared {
            let kind = asking.ask(asking.question(id)).await;
            let expected = if committed.contains(&id) {
                VerdictKind::Committed
            } else {
                VerdictKind::RolledBack
            };
            assert_eq!(kind, expected);
            assert_eq!(*first.get(&id).unwrap_or(&expected), expected);
            let state = shop.service.message_state(id);
            assert_ne!(
                state,
                Some(match expected {
                    VerdictKind::Committed => MessageState::Cancelled,
                    _ => MessageState::Confirmed,
                })
            );
        }
        no_deadlock(&shop).await;
    }
}

/// The server has counted none in this database. Its counts come a little later.
async fn no_deadlock(shop: &Shop) {
    shop.until(
        "statistics of this database",
        "SELECT xact_commit > 0 FROM pg_stat_database WHERE datname = current_database()",
    )
    .await;
    let counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(shop.count(counted).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_business_with_several_messages_is_never_the_victim_of_a_deadlock() {
    let shop = Shop::new().await;
    // Deadlocks are looked for long before a check stops waiting.
    let name = shop.scratch.options().get_database().unwrap().to_owned();
    sqlx::raw_sql(AssertSqlSafe(format!(
        "ALTER DATABASE {name} SET deadlock_timeout = '1ms'"
    )))
    .execute(&shop.pool)
    .await
    .unwrap();
    let asking = Asking::about(&shop.pool).await;
    let mut business = shop.connection().await;
    let mut both_won = [0, 0];
    for _ in 0..40 {
        let mut ids: Vec<_> = (0..6).map(|_| Uuid::now_v7()).collect();
        let mut checks = JoinSet::new();
        for turn in 0..4 {
            let mut asking = asking.clone();
            ids.rotate_left(turn);
            let mut asked = ids.clone();
            if turn % 2 == 1 {
                asked.reverse();
            }
            let questions = asked.iter().map(|id| asking.question(*id)).collect();
            checks.spawn(async move { asking.ask_all(questions).await });
        }
        ids.sort();
        // As a program in any language does it: one statement per id, in sorted order.
        let mut tx = business.begin().await.unwrap();
        let mut fenced = false;
        for id in &ids {
            let inserted = sqlx::query(
                "INSERT INTO handfast_fence (message_id, verdict) VALUES ($1, 'COMMITTED')
                     ON CONFLICT DO NOTHING",
            )
            .bind(id)
            .execute(&mut *tx)
            .await
            .unwrap();
            fenced |= inserted.rows_affected() == 0;
        }
        if fenced {
            tx.rollback().await.unwrap();
        } else {
            tx.commit().await.unwrap();
        }
        checks.join_all().await;
        both_won[usize::from(fenced)] += 1;
    }
    no_deadlock(&shop).await;
    assert_eq!(both_won.iter().sum::<i32>(), 40);
}

#[tokio::test]
async fn one_open_business_does_not_hold_up_the_others() {
    for level in LEVELS {
        let shop = Shop::at(level).await;
        let mut asking = Asking::about(&shop.pool).await;
        let business = Standing::begin(&shop, Ok(42)).await;
        let mut ids: Vec<_> = (0..99).map(|_| Uuid::now_v7()).collect();
        ids.insert(40, business.id);
        let questions = ids.iter().map(|id| asking.question(*id)).collect();
        let began = Instant::now();
        let kinds = asking.ask_all(questions).await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
        for (id, kind) in ids.iter().zip(kinds) {
            let expected = if *id == business.id {
                VerdictKind::InProgress
            } else {
                VerdictKind::RolledBack
            };
            assert_eq!(kind, expected, "{level}");
        }
        assert_eq!(business.end().await.unwrap(), Outcome::Committed(42));
    }
}

#[tokio::test]
async fn checks_use_two_connections_at_most() {
    let shop = Shop::new().await;
    let asking = Asking::about(&shop.pool).await;
    let business = Standing::begin(&shop, Ok(42)).await;
    let mut calls = JoinSet::new();
    for _ in 0..8 {
        let mut asking = asking.clone();
        let questions = vec![asking.question(business.id)];
        calls.spawn(async move { asking.ask_all(questions).await });
    }
    shop.until_somebody_waits().await;
    let mut most = 0;
    while !calls.is_empty() {
        let waiting = shop
            .count(
                "SELECT count(*) FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock'",
            )
            .await;
        most = most.max(waiting);
        if let Some(kinds) = calls.try_join_next() {
            assert_eq!(kinds.unwrap(), [VerdictKind::InProgress]);
        }
    }
    assert!((1..=2).contains(&most), "{most}");
    business.end().await.unwrap();
}

#[tokio::test]
async fn another_databases_fence_is_unknown() {
    let shop = Shop::new().await;
    let other = Shop::new().await;
    let mut asking = Asking::about(&shop.pool).await;
    let id = Uuid::now_v7();
    let foreign = v1::Question {
        fence: Asking::about(&other.pool).await.fence.as_bytes().to_vec(),
        ..asking.question(id)
    };
    assert_eq!(asking.ask(foreign.clone()).await, VerdictKind::Unknown);
    assert_eq!(shop.verdict(id).await, None);
    // Behind an endpoint for both, each answers for its own.
    let server = StatusServer::new()
        .fence(shop.pool.clone())
        .fence(other.pool.clone());
    let (client, _stop) = serving(server).await;
    asking.client = client;
    assert_eq!(asking.ask(foreign).await, VerdictKind::RolledBack);
    assert_eq!(shop.verdict(id).await, None);
    assert_eq!(other.verdict(id).await.as_deref(), Some("ROLLED_BACK"));
}

#[tokio::test]
async fn what_is_older_than_the_fence_remembers_is_unknown() {
    const DAY_US: i64 = 24 * 60 * 60 * 1_000_000;
    let shop = Shop::new().await;
    let mut asking = Asking::about(&shop.pool).await;
    let id = Uuid::now_v7();
    let old = v1::Question {
        prepared_at: asking.now_us - 29 * DAY_US - 60_000_000,
        ..asking.question(id)
    };
    assert_eq!(asking.ask(old).await, VerdictKind::Unknown);
    assert_eq!(shop.verdict(id).await, None);
    let young = v1::Question {
        prepared_at: asking.now_us - 29 * DAY_US + 600_000_000,
        ..asking.question(id)
    };
    assert_eq!(asking.ask(young).await, VerdictKind::RolledBack);
}
