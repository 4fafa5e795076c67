use std::path::PathBuf;

use sqlx::ConnectOptions as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;

use super::*;
use crate::clock::ManualClock;
use crate::message::{AnswerKind, CheckPolicy, DeliveryPolicy};
use crate::store::conformance::{Harness, conformance_suite};
use crate::topology::{Producer, Subscription, Topic};

struct OnSqlite {
    store: Arc<SqliteStore>,
    clock: Arc<ManualClock>,
    folder: TempDir,
}

impl OnSqlite {
    fn path(&self) -> PathBuf {
        self.folder.path().join("handfast.db")
    }

    /// A second connection, as a person with a shell would have it.
    async fn by_hand(&self) -> SqliteConnection {
        SqliteConnectOptions::new()
            .filename(self.path())
            .connect()
            .await
            .unwrap()
    }

    async fn reopen(&mut self) {
        self.store.close().await;
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        // The lock goes with the last handle to the store.
        let closed = tempfile::tempdir().unwrap();
        let path = closed.path().join("closed.db");
        self.store = Arc::new(
            SqliteStore::open(&path, self.clock.clone(), 1)
                .await
                .unwrap(),
        );
        let path = folder.path().join("handfast.db");
        self.store = Arc::new(
            SqliteStore::open(&path, self.clock.clone(), 1)
                .await
                .unwrap(),
        );
        self.folder = folder;
    }
}

#[async_trait]
impl Harness for OnSqlite {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    async fn pass(&self, span: Duration) {
        self.clock.advance(span);
    }

    async fn write_unknown_state(&self, table: &str, id: MessageId) {
        let column = if table == "message" {
            "id"
        } else {
            "message_id"
        };
        let sql = format!("UPDATE {table} SET state = 'ARCHIVED' WHERE {column} = ?");
        sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(&id.as_bytes()[..])
            .execute(&mut self.by_hand().await)
            .await
            .unwrap();
    }
}

async fn open() -> OnSqlite {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::at(Timestamp::from_micros(
        1_700_000_000_000_000,
    )));
    let path = folder.path().join("handfast.db");
    let store = Arc::new(SqliteStore::open(&path, clock.clone(), 1).await.unwrap());
    OnSqlite {
        store,
        clock,
        folder,
    }
}

mod conforms {
    use super::*;
    conformance_suite!(open);
}

fn small_topology() -> Topology {
    Topology {
        version: 1,
        producers: [(
            "payment".to_owned(),
            Producer {
                status_endpoint: None,
                checks: CheckPolicy {
                    check_after: Duration::from_secs(10),
                },
            },
        )]
        .into(),
        topics: [("paid".to_owned(), Topic::default())].into(),
        subscriptions: [(
            "accounting".to_owned(),
            Subscription {
                topic: "paid".into(),
                policy: DeliveryPolicy::default(),
                max_in_queue: None,
                amqp_user: None,
            },
        )]
        .into(),
    }
}

fn paid(n: u128) -> NewMessage {
    NewMessage {
        id: MessageId::from(uuid::Uuid::from_u128(n)),
        producer: "payment".into(),
        topic: "paid".into(),
        key: None,
        content_type: String::new(),
        headers: Vec::new(),
        payload: vec![0; 100],
        deliver_after: None,
        fence: None,
    }
}

const NORMAL: Lane = Lane::Normal {
    limit: 10,
    max_bytes: usize::MAX,
};

#[tokio::test]
async fn a_second_process_is_refused_in_one_line() {
    let harness = open().await;
    let refused = SqliteStore::open(&harness.path(), harness.clock.clone(), 1)
        .await
        .err();
    let text = refused.expect("the second is refused").to_string();
    assert!(text.contains("another handfast holds its lock"), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_refused_in_one_line() {
    let clock = Arc::new(ManualClock::at(Timestamp::default()));
    let path = PathBuf::from("/nonexistent/folder/handfast.db");
    let text = SqliteStore::open(&path, clock, 1)
        .await
        .err()
        .expect("refused")
        .to_string();
    assert!(text.contains("/nonexistent/folder/handfast.db"), "{text}");
    assert!(text.contains("can be written"), "{text}");
}

#[tokio::test]
async fn a_schema_of_a_newer_program_is_refused() {
    let mut harness = open().await;
    sqlx::query("INSERT INTO handfast_service_version (version, name) VALUES (99, 'later')")
        .execute(&mut harness.by_hand().await)
        .await
        .unwrap();
    let path = harness.path();
    harness.store.close().await;
    let folder = std::mem::replace(&mut harness.folder, tempfile::tempdir().unwrap());
    let clock = harness.clock.clone();
    drop(harness);
    let text = SqliteStore::open(&path, clock, 1)
        .await
        .err()
        .expect("refused")
        .to_string();
    assert!(
        text.contains("version 99") && text.contains("newer program"),
        "{text}"
    );
    drop(folder);
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.txt");
    std::fs::write(
        &path,
        "a list of groceries, long enough to be no database at all",
    )
    .unwrap();
    let clock = Arc::new(ManualClock::at(Timestamp::default()));
    let text = SqliteStore::open(&path, clock, 1)
        .await
        .err()
        .expect("refused")
        .to_string();
    assert!(text.contains("notes.txt"), "{text}");
    assert_eq!(
        std::fs::read(&path).unwrap()[..6],
        *b"a list",
        "it is not touched"
    );
}

#[tokio::test]
async fn at_the_start_all_leases_are_void_and_nothing_was_counted() {
    let mut harness = open().await;
    harness
        .store
        .apply_topology(small_topology())
        .await
        .unwrap();
    harness
        .store
        .publish(vec![paid(1), paid(2)], Handoff::none())
        .await
        .unwrap();
    let lease = Duration::from_secs(30);
    let claims = harness
        .store
        .claim_deliveries("accounting", NORMAL, lease)
        .await
        .unwrap()
        .deliveries;
    let sent = vec![Sent {
        id: claims[0].id,
        token: claims[0].token,
    }];
    harness
        .store
        .mark_sent("accounting", sent, Duration::from_secs(45))
        .await
        .unwrap();
    harness.reopen().await;
    let again = harness
        .store
        .claim_deliveries("accounting", NORMAL, lease)
        .await
        .unwrap()
        .deliveries;
    assert_eq!(
        again
            .iter()
            .map(|claim| claim.generation)
            .collect::<Vec<_>>(),
        [2, 2]
    );
    let view = harness
        .store
        .show(claims[0].id, false)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(view.deliveries[0].attempts, 0);
    let answer = Answer {
        id: claims[0].id,
        generation: 1,
        sent_at: None,
        kind: AnswerKind::Consumed,
    };
    let outcomes = harness
        .store
        .acknowledge("accounting", vec![answer])
        .await
        .unwrap();
    assert_eq!(
        outcomes,
        [AnswerOutcome::Recorded],
        "what the old run sent may still be done"
    );
}

#[tokio::test]
async fn time_goes_on_from_what_was_written() {
    let mut harness = open().await;
    harness.clock.advance(Duration::from_secs(3600));
    harness
        .store
        .apply_topology(small_topology())
        .await
        .unwrap();
    let before = harness.store.now();
    harness.clock.set_wall(Timestamp::default());
    harness.reopen().await;
    assert!(harness.store.now() >= before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_person_holds_the_lock_calls_are_unavailable_and_afterwards_go_on() {
    let harness = open().await;
    harness
        .store
        .apply_topology(small_topology())
        .await
        .unwrap();
    let mut person = harness.by_hand().await;
    sqlx::query("BEGIN IMMEDIATE")
        .execute(&mut person)
        .await
        .unwrap();
    let calls = (1..=20).map(|n| {
        let store = harness.store.clone();
        tokio::spawn(async move { store.publish(vec![paid(n)], Handoff::none()).await })
    });
    for call in calls.collect::<Vec<_>>() {
        let error = call.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    }
    sqlx::query("ROLLBACK").execute(&mut person).await.unwrap();
    let written = harness
        .store
        .publish(vec![paid(1)], Handoff::none())
        .await
        .unwrap();
    assert!(written.items[0].is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_takes_no_other_with_it() {
    let harness = open().await;
    harness
        .store
        .apply_topology(small_topology())
        .await
        .unwrap();
    harness
        .store
        .publish(vec![paid(1)], Handoff::none())
        .await
        .unwrap();
    // A state from the future makes every call about this one message fail.
    harness.write_unknown_state("message", paid(1).id).await;
    let calls = (1..=40).map(|n| {
        let store = harness.store.clone();
        tokio::spawn(async move { (n, store.publish(vec![paid(n)], Handoff::none()).await) })
    });
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            (1, result) => assert!(matches!(result, Err(Error::Inconsistent { .. }))),
            (n, result) => assert!(result.unwrap().items[0].is_ok(), "{n}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_wait_together_are_committed_together() {
    let mut log_bytes = Vec::new();
    for together in [false, true] {
        let harness = open().await;
        harness
            .store
            .apply_topology(small_topology())
            .await
            .unwrap();
        let mut calls = tokio::task::JoinSet::new();
        for n in 1..=60 {
            let store = harness.store.clone();
            calls
                .spawn(async move { store.publish(vec![paid(n)], Handoff::none()).await.unwrap() });
            if !together {
                calls.join_next().await;
            }
        }
        while calls.join_next().await.is_some() {}
        // Every commit adds the pages it changed to the write-ahead log.
        let log = harness.folder.path().join("handfast.db-wal");
        log_bytes.push(std::fs::metadata(log).unwrap().len());
    }
    assert!(
        log_bytes[1] * 2 < log_bytes[0],
        "alone and together: {log_bytes:?} bytes"
    );
}

#[tokio::test]
async fn hot_statements_walk_along_an_index() {
    let harness = open().await;
    let mut db = harness.by_hand().await;
    for (sql, index) in [
        (
            "SELECT id FROM message WHERE producer = 'p' AND state = 'PREPARED' AND check_at <= 1
              ORDER BY check_at LIMIT 9",
            "message_to_check",
        ),
        (
            "SELECT d.message_id, m.bucket FROM delivery d JOIN message m ON m.id = d.message_id
              WHERE d.subscription = 's' AND d.state = 'PENDING' AND d.stream_ends = 0
                AND d.due_at <= 1 ORDER BY d.due_at LIMIT 9",
            "delivery_to_send",
        ),
        (
            "SELECT min(due_at) FROM delivery
              WHERE subscription = 's' AND state = 'PENDING' AND stream_ends > 0",
            "delivery_to_send_alone",
        ),
        (
            "SELECT message_id FROM delivery
              WHERE subscription = 's' AND state = 'SENT' AND due_at <= 1 ORDER BY due_at LIMIT 9",
            "delivery_silent",
        ),
        (
            "SELECT message_id FROM delivery
              WHERE subscription = 's' AND state IN ('PENDING', 'SENT') AND confirmed_at < 1
              ORDER BY confirmed_at LIMIT 9",
            "delivery_open",
        ),
        (
            "SELECT id FROM message WHERE producer = 'p' AND topic = 't' AND key = 'k'
              AND key IS NOT NULL AND state <> 'CANCELLED'",
            "message_by_key",
        ),
        (
            "SELECT id FROM message m WHERE m.bucket = 1 ORDER BY m.id LIMIT 9",
            "message_by_bucket",
        ),
    ] {
        let plan: Vec<(i64, i64, i64, String)> =
            sqlx::query_as(sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}")))
                .fetch_all(&mut db)
                .await
                .unwrap();
        let plan: Vec<_> = plan.into_iter().map(|(.., step)| step).collect();
        assert!(
            plan.iter()
                .any(|step| step.contains(&format!("INDEX {index} "))),
            "{plan:?}"
        );
        assert!(
            !plan.iter().any(|step| step.contains("TEMP B-TREE")),
            "{plan:?}"
        );
        assert!(
            !plan.iter().any(|step| step.starts_with("SCAN")),
            "{plan:?}"
        );
    }
}
