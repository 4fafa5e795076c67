//! A server that stops, stands still, or has no room.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use handfast_servers::{Options, Postgres, SmallDisk};
use handfast_service::store::{Error, Handoff, Store as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::world::{READY_WITHIN, is_whole, open, paid, ready_again, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_under_load_keeps_what_was_acknowledged() {
    let mut server = server(&[]);
    let store = open(&server).await;
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let mut calls = JoinSet::new();
    for caller in 0..8_u128 {
        let (store, acknowledged) = (store.clone(), acknowledged.clone());
        calls.spawn(async move {
            let mut kept = Vec::new();
            for n in caller * 100_000 + 1.. {
                match store.publish(vec![paid(n, 100)], Handoff::none()).await {
                    Ok(_) => {
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                        kept.push(n);
                    }
                    Err(Error::Unavailable { .. }) => return (kept, n),
                    Err(error) => panic!("{error}"),
                }
            }
            unreachable!("it ends with the server")
        });
    }
    let began = Instant::now();
    while acknowledged.load(Ordering::Relaxed) < 100 {
        assert!(began.elapsed() < READY_WITHIN * 2, "it is too slow");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.kill().unwrap();
    let ended = calls.join_all().await;
    server.start_again().unwrap();
    ready_again(&store, 1).await;
    for (kept, unknown) in ended {
        for n in kept {
            assert!(is_whole(&store, n).await, "{n} was acknowledged");
        }
        // All of it or nothing.
        is_whole(&store, unknown).await;
    }
}

/// Stops a process and lets it go on when dropped.
struct Stopped(u32);

impl Stopped {
    fn process(pid: u32) -> Self {
        signal(pid, "-STOP");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, "-CONT");
    }
}

fn signal(pid: u32, signal: &str) {
    let sent = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(sent.is_ok_and(|status| status.success()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_is_unavailable_in_time() {
    let server = server(&[]);
    let store = open(&server).await;
    store
        .publish(vec![paid(1, 100)], Handoff::none())
        .await
        .unwrap();
    let backends = server
        .sql(
            "postgres",
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'handfast'",
        )
        .unwrap();
    let mut stopped: Vec<_> = backends
        .lines()
        .map(|pid| Stopped::process(pid.parse().unwrap()))
        .collect();
    stopped.push(Stopped::process(server.pid().unwrap()));
    let began = Instant::now();
    let error = store
        .publish(vec![paid(2, 100)], Handoff::none())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10), "{error}");
    drop(stopped);
    ready_again(&store, 2).await;
    assert!(is_whole(&store, 1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_free_connection_calls_are_unavailable_and_afterwards_go_on() {
    let server = server(&[("max_connections", "24")]);
    let store = open(&server).await;
    let mut held = Vec::new();
    // The lane of publish has none yet.
    while let Ok(connection) = {
        use sqlx::Connection as _;
        sqlx::PgConnection::connect(&server.url("postgres")).await
    } {
        held.push(connection);
    }
    let error = store
        .publish(vec![paid(1, 100)], Handoff::none())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    drop(held);
    ready_again(&store, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_unavailable_until_there_is_room() {
    let disk = SmallDisk::mount(160).unwrap();
    let server = Postgres::start_with(&Options::new().within(disk.path())).unwrap();
    let store = open(&server).await;
    store
        .publish(vec![paid(1, 50_000)], Handoff::none())
        .await
        .unwrap();
    let filler = disk.fill().unwrap();
    let mut kept = Vec::new();
    let began = Instant::now();
    let mut n = 2;
    let error = loop {
        match store.publish(vec![paid(n, 50_000)], Handoff::none()).await {
            Ok(_) => kept.push(n),
            Err(error) => break error,
        }
        assert!(began.elapsed() < READY_WITHIN, "{n} found room");
        n += 1;
    };
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    std::fs::remove_file(filler).expect("the filler");
    ready_again(&store, n).await;
    for n in kept {
        assert!(is_whole(&store, n).await, "{n} was acknowledged");
    }
    drop(store);
    drop(server);
}
