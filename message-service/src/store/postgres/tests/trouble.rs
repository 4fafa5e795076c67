//! A database that refuses, goes away, or is the wrong one.

use tokio::time::Instant;

use super::*;

/// How soon all is well again once the database is.
const READY_WITHIN: Duration = Duration::from_secs(5);

impl OnPostgres {
    /// Ends all sessions of the store, as a restart of the server does.
    async fn end_sessions(&self) {
        self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()
                AND application_name = 'handfast'",
        )
        .await;
    }

    async fn set_read_only(&self, on: bool) {
        self.run(&format!(
            "BEGIN READ WRITE;
             DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = {on}',
                                current_database());
             END $$;
             COMMIT"
        ))
        .await;
    }
}

/// Publishes until it works; panics after [`READY_WITHIN`].
async fn ready_again(store: &PostgresStore, n: u128) {
    let began = Instant::now();
    while let Err(error) = store.publish(vec![paid(n)], Handoff::none()).await {
        assert!(
            matches!(error, Error::Unavailable { .. }) && began.elapsed() < READY_WITHIN,
            "{error}"
        );
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_sessions_end_under_load_calls_are_done_or_unavailable() {
    let harness = ready().await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=400_u128 {
        let store = harness.store.clone();
        calls.spawn(async move { (n, store.publish(vec![paid(n)], Handoff::none()).await) });
        if n % 100 == 0 {
            harness.end_sessions().await;
        }
    }
    while let Some(call) = calls.join_next().await {
        let (n, result) = call.unwrap();
        if let Err(error) = result {
            assert!(matches!(error, Error::Unavailable { .. }), "{n}: {error}");
        }
    }
    ready_again(&harness.store, 1).await;
    harness.store.counts().await.unwrap();
    // Nothing is half-written: a message has both deliveries, and its body.
    for n in 1..=400 {
        if let Some(shown) = harness.store.show(id(n), true).await.unwrap() {
            assert_eq!((shown.deliveries.len(), shown.body.is_some()), (2, true));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_ended_while_nothing_happened_are_not_noticed() {
    let harness = ready().await;
    harness
        .store
        .publish(vec![paid(1)], Handoff::none())
        .await
        .unwrap();
    harness.end_sessions().await;
    // A connection is doubted after a second without use.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    harness
        .store
        .publish(vec![paid(2)], Handoff::none())
        .await
        .unwrap();
    assert!(harness.store.show(id(2), false).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_database_is_unavailable_and_read_until_it_is_written_again() {
    let harness = ready().await;
    harness
        .store
        .publish(vec![paid(1)], Handoff::none())
        .await
        .unwrap();
    harness.set_read_only(true).await;
    harness.end_sessions().await;
    let began = Instant::now();
    loop {
        let refused = harness.store.publish(vec![paid(2)], Handoff::none()).await;
        let error = refused.expect_err("nothing is written");
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        if error.to_string().contains("read-only") {
            break;
        }
        assert!(began.elapsed() < READY_WITHIN, "{error}");
    }
    assert!(harness.store.show(id(1), true).await.unwrap().is_some());
    let clock = Arc::new(SystemClock::new());
    let refused = PostgresStore::open(harness.database.options(), clock, 2).await;
    let text = refused.err().expect("it is read-only").to_string();
    assert!(text.contains("read-only"), "{text}");
    harness.set_read_only(false).await;
    ready_again(&harness.store, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_holds_stops_nobody_else() {
    let harness = ready().await;
    let messages = (1..=20).map(paid).collect();
    harness.store.prepare(messages, CHECK_AFTER).await.unwrap();
    let mut person = harness.by_hand().await;
    run(
        &mut person,
        &format!(
            "BEGIN; SELECT FROM message WHERE id = '{}' FOR UPDATE",
            id(7)
        ),
    )
    .await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=20 {
        let store = harness.store.clone();
        calls.spawn(async move {
            (
                n,
                store
                    .decide("payment", vec![confirm(n)], Handoff::none())
                    .await,
            )
        });
    }
    while let Some(call) = calls.join_next().await {
        let (n, result) = call.unwrap();
        assert_eq!(is_unavailable(&result), n == 7, "{n}: {result:?}");
    }
    run(&mut person, "ROLLBACK").await;
    let written = harness
        .store
        .decide("payment", vec![confirm(7)], Handoff::none())
        .await;
    assert!(written.unwrap().items[0].is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_somebody_is_inserting_stops_nobody_else() {
    let harness = ready().await;
    let mut person = harness.by_hand().await;
    run(
        &mut person,
        &format!(
            "BEGIN; INSERT INTO message (id, producer, topic, state, content_hash, bucket,
                                         body_bytes, check_at, prepared_at)
             VALUES ('{}', 'payment', 'paid', 'PREPARED', '', 1, 0, now(), now())",
            id(7)
        ),
    )
    .await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=16 {
        let store = harness.store.clone();
        calls.spawn(async move { (n, store.prepare(vec![paid(n)], CHECK_AFTER).await) });
    }
    while let Some(call) = calls.join_next().await {
        let (n, result) = call.unwrap();
        assert_eq!(is_unavailable(&result), n == 7, "{n}: {result:?}");
    }
    run(&mut person, "ROLLBACK").await;
    let written = harness.store.prepare(vec![paid(7)], CHECK_AFTER).await;
    assert!(written.unwrap().items[0].is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_written_takes_no_other_call_with_it() {
    let harness = ready().await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=40 {
        let store = harness.store.clone();
        let message = NewMessage {
            // The limits refuse it at the edge; the database would too.
            key: (n == 13).then(|| "a\0b".to_owned()),
            ..paid(n)
        };
        calls.spawn(async move { (n, store.publish(vec![message], Handoff::none()).await) });
    }
    while let Some(call) = calls.join_next().await {
        match call.unwrap() {
            (13, result) => assert!(matches!(result, Err(Error::Inconsistent { .. }))),
            (n, result) => assert!(result.unwrap().items[0].is_ok(), "{n}"),
        }
    }
    let reason = AnswerKind::Failed("a\0b".into());
    harness
        .store
        .claim_deliveries("points", normal(100), LEASE)
        .await
        .unwrap();
    let answer = Answer {
        kind: reason,
        ..consumed(1)
    };
    let outcomes = harness.store.acknowledge("points", vec![answer]).await;
    assert_eq!(outcomes.unwrap(), [AnswerOutcome::Recorded]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_default_of_repeatable_read_does_not_matter() {
    let harness = ready().await;
    harness
        .run(
            "DO $$ BEGIN
                 EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation =
                                 ''repeatable read''', current_database());
                 EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off',
                                current_database());
             END $$",
        )
        .await;
    let stores = [harness.another().await, harness.another().await];
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=200_u128 {
        for store in &stores {
            let store = store.clone();
            calls
                .spawn(async move { store.publish(vec![paid(n % 20 + 1)], Handoff::none()).await });
        }
    }
    while let Some(call) = calls.join_next().await {
        assert!(call.unwrap().unwrap().items[0].is_ok());
    }
    let total = |store: &PostgresStore| {
        store
            .repeats
            .total
            .load(std::sync::atomic::Ordering::Relaxed)
    };
    assert_eq!(stores.iter().map(|store| total(store)).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_start_at_once_share_one_schema_and_identity() {
    let database = Scratch::create().await;
    let opening = (0..4).map(|seed| opened(&database, seed));
    let stores = futures_util::future::join_all(opening).await;
    let identity = stores[0].identity();
    assert!(stores.iter().all(|store| store.identity() == identity));
    let elsewhere = open().await;
    assert_ne!(elsewhere.store.identity(), identity);
}

#[tokio::test]
async fn a_schema_of_a_newer_program_is_refused() {
    let harness = open().await;
    harness
        .run("INSERT INTO handfast_service_version (version, name) VALUES (99, 'later')")
        .await;
    let clock = Arc::new(SystemClock::new());
    let refused = PostgresStore::open(harness.database.options(), clock, 1).await;
    let text = refused.err().expect("refused").to_string();
    assert!(
        text.contains("version 99") && text.contains("newer program"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_refused_in_one_line_without_the_password() {
    let clock = Arc::new(SystemClock::new());
    let address: Address = "postgres://me:secret@127.0.0.1:1/shop".parse().unwrap();
    assert!(!format!("{address:?}").contains("secret"));
    let refused = PostgresStore::open(address, clock, 1).await;
    let text = refused.err().expect("refused").to_string();
    assert!(text.contains("postgres://127.0.0.1:1/shop"), "{text}");
    assert!(text.contains("see that the server runs"), "{text}");
    assert!(!text.contains("secret") && !text.contains('\n'), "{text}");
    let unreadable = "postgres://me:secret@host:port/shop".parse::<Address>();
    let text = unreadable.expect_err("unreadable").to_string();
    assert!(!text.contains("secret") && !text.contains('\n'), "{text}");
}

#[tokio::test]
async fn a_database_that_cannot_hold_every_letter_is_refused() {
    let harness = open().await;
    let name = format!("handfast_test_{}", Uuid::new_v4().simple());
    harness
        .run(&format!(
            "CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'
             TEMPLATE template0"
        ))
        .await;
    let clock = Arc::new(SystemClock::new());
    let options = harness.database.options().database(&name);
    let refused = PostgresStore::open(options, clock, 1).await;
    harness
        .run(&format!("DROP DATABASE {name} WITH (FORCE)"))
        .await;
    let text = refused.err().expect("refused").to_string();
    assert!(text.contains("UTF8"), "{text}");
}
