//! Every mode runs and counts; how fast is nobody's business here.

#![expect(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Runs a mode. One that hangs fails its test, and not the whole run of all tests.
fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300", env!("CARGO_BIN_EXE_bench")]);
    command.args(arguments).output().unwrap()
}

/// Runs a mode on the servers of all tests, and reads its last line.
fn measured(arguments: &[&str]) -> Value {
    let server = |variable| std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is set"));
    let (store, broker) = (
        server("HANDFAST_TEST_POSTGRES"),
        server("HANDFAST_TEST_AMQP"),
    );
    let common = [
        "--rounds", "1", "--anyway", "--json", "--store", &store, "--broker", &broker,
    ];
    let done = bench(&[arguments, &common].concat());
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let output = String::from_utf8(done.stdout).unwrap();
    serde_json::from_str(output.lines().last().unwrap()).unwrap()
}

#[test]
fn the_pipeline_is_measured_beside_the_bare_one() {
    let said = measured(&["pipeline", "--messages", "700", "--subscriptions", "2"]);
    assert_eq!(said["mode"], "pipeline");
    assert!(said["ratio_median"].as_f64().unwrap() > 0.0, "{said}");
    for figure in ["bare_per_s", "handfast_per_s"] {
        let figure = &said[figure];
        assert_eq!(figure["rounds"].as_array().unwrap().len(), 1, "{said}");
        assert!(figure["min"].as_f64() <= figure["max"].as_f64(), "{said}");
    }
    assert!(said["peak_memory_mib"].as_f64().unwrap() > 1.0, "{said}");
    for side in ["bare", "handfast"] {
        let used = &said["used"][side];
        let wal = used["wal_bytes_per_message"]["median"].as_f64().unwrap();
        // The body alone is written once at least.
        assert!(wal > 1_024.0, "{said}");
        let without = &used["wal_bytes_per_message_without_images"]["median"];
        assert!(
            (1_024.0..=wal).contains(&without.as_f64().unwrap()),
            "{said}"
        );
    }
    assert_eq!(said["about"]["postgresql"]["fsync"], "on");
}

#[test]
fn latency_is_measured_from_the_scheduled_time() {
    let said = measured(&["latency", "--rate", "50", "--seconds", "1"]);
    let of = |name: &str| said["ms"][name]["median"].as_f64().unwrap();
    assert!(of("to the handler, p50") > 0.0, "{said}");
    assert!(
        of("to the handler, p50") <= of("to the handler, p99"),
        "{said}"
    );
    // A message without a time would be centuries late.
    assert!(of("to the handler, max") < 60_000.0, "{said}");
    assert!(of("prepare, p50") > 0.0, "{said}");
}

#[test]
fn single_calls_are_measured_beside_the_bare_pipeline() {
    let said = measured(&["unary", "--messages", "300", "--callers", "8"]);
    assert!(said["ratio_median"].as_f64().unwrap() > 0.0, "{said}");
    assert!(
        said["unary_per_s"]["median"].as_f64().unwrap() > 0.0,
        "{said}"
    );
}

#[test]
fn more_subscriptions_are_measured_beside_one() {
    let said = measured(&["fanout", "--messages", "200"]);
    for side in ["two", "four", "eight"] {
        assert!(
            said["ratios"][side]["median"].as_f64().unwrap() > 0.0,
            "{said}"
        );
    }
}

#[test]
fn payloads_of_all_sizes_are_measured() {
    let said = measured(&["payload", "--messages", "50", "--megabytes", "3"]);
    for side in ["bytes_100", "bytes_1024", "bytes_262144"] {
        let rate = &said[format!("{side}_per_s")]["median"];
        assert!(rate.as_f64().unwrap() > 0.0, "{said}");
    }
    // Each message is in the WAL with its payload.
    let wal = &said["used"]["bytes_262144"]["wal_bytes_per_message"]["median"];
    assert!(wal.as_f64().unwrap() > 262_144.0, "{said}");
}

#[test]
fn what_a_service_pays_for_its_messages_is_measured() {
    let said = measured(&["sdk-path", "--messages", "300", "--tasks", "8"]);
    for side in ["alone", "transact", "one_by_one"] {
        let rate = &said[format!("{side}_per_s")]["median"];
        assert!(rate.as_f64().unwrap() > 0.0, "{said}");
    }
    assert!(said["ratio_median"].as_f64().unwrap() > 0.0, "{said}");
}

#[test]
fn a_full_store_is_measured_beside_an_empty_one() {
    let said = measured(&["stored", "--stored", "100000", "--messages", "500"]);
    assert!(said["loaded_s"].as_f64().unwrap() > 0.0, "{said}");
    for side in ["stored", "snapshot"] {
        assert!(
            said["ratios"][side]["median"].as_f64().unwrap() > 0.0,
            "{said}"
        );
    }
}

#[test]
fn what_waits_for_a_sleeper_is_not_touched_by_the_claims_of_another() {
    let waiting = [
        "waiting",
        "--waiting",
        "30000",
        "--due",
        "300",
        "--messages",
        "300",
    ];
    let said = measured(&waiting);
    assert_eq!(said["touched"], 0, "{said}");
    assert!(said["claim_ms"]["median"].as_f64().unwrap() > 0.0, "{said}");
    assert!(said["peak_memory_mib"].as_f64().unwrap() > 1.0, "{said}");
}

#[test]
fn an_idle_service_is_measured() {
    let said = measured(&["idle", "--stored", "100", "--settle", "0", "--seconds", "2"]);
    assert!(
        said["core_percent"]["median"].as_f64().unwrap() >= 0.0,
        "{said}"
    );
    // It says at least that it is there.
    assert!(
        said["statements_per_s"]["median"].as_f64().unwrap() > 0.1,
        "{said}"
    );
}

#[test]
fn the_embedded_engines_are_measured() {
    let done = bench(&[
        "embedded",
        "--messages",
        "300",
        "--rounds",
        "1",
        "--anyway",
        "--json",
    ]);
    let output = String::from_utf8(done.stdout).unwrap();
    let said: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    assert!(
        said["handfast_per_s"]["median"].as_f64().unwrap() > 0.0,
        "{said}"
    );
}

#[test]
fn the_pure_code_is_measured() {
    let done = bench(&["pure", "--rounds", "1", "--anyway", "--json"]);
    let output = String::from_utf8(done.stdout).unwrap();
    let said: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    assert!(
        said["ns"]["content hash"]["median"].as_f64().unwrap() > 0.0,
        "{said}"
    );
}

#[test]
fn an_outage_of_rabbitmq_is_measured_and_what_was_accepted_is_delivered() {
    let drain = [
        "drain", "--gone", "1", "--after", "8", "--rate", "100", "--rounds", "1",
    ];
    let done = bench(&[&drain[..], &["--anyway", "--json"]].concat());
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let output = String::from_utf8(done.stdout).unwrap();
    let said: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    assert!(said["accepted"]["median"].as_f64().unwrap() > 0.0, "{said}");
    assert!(said["gone_s"]["median"].as_f64().unwrap() > 1.0, "{said}");
    assert!(said["waiting"]["median"].as_f64().unwrap() > 0.0, "{said}");
}

#[test]
fn a_named_rabbitmq_is_not_ended() {
    let refused = bench(&["drain", "--anyway", "--broker", "amqp://127.0.0.1:1"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("leave --broker out"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}

#[test]
fn an_interrupted_run_leaves_nothing_on_servers_that_stay() {
    let store = std::env::var("HANDFAST_TEST_POSTGRES").unwrap();
    let broker = std::env::var("HANDFAST_TEST_AMQP").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ask = |sql: String| {
        runtime.block_on(async {
            use sqlx::{Connection as _, Row as _};
            let mut db = sqlx::PgConnection::connect(&store).await.unwrap();
            let row = sqlx::query(sqlx::AssertSqlSafe(sql))
                .fetch_optional(&mut db)
                .await;
            row.unwrap().map(|row| row.get::<i64, _>(0))
        })
    };
    // Its databases are known by who owns them.
    let role = format!("bench_{}", uuid::Uuid::new_v4().simple());
    ask(format!("CREATE ROLE {role} LOGIN CREATEDB"));
    let databases = || {
        let of = format!(
            "SELECT count(*) FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba
              WHERE r.rolname = '{role}'"
        );
        ask(of).unwrap()
    };
    let (before, after) = store.split_once("//").unwrap();
    let (_, server) = after.split_once('@').unwrap();
    let mut running = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "pipeline",
            "--anyway",
            "--store",
            &format!("{before}//{role}@{server}"),
        ])
        .args(["--broker", &broker])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while databases() < 3 && Instant::now() < deadline {
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
    }
    assert_eq!(databases(), 3);
    let pid = running.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    assert_eq!(running.wait().unwrap().code(), Some(130));
    assert_eq!(databases(), 0);
    ask(format!("DROP ROLE {role}"));
}

#[test]
fn a_wrong_call_is_one_line_and_2() {
    for wrong in [
        &["pipelime"][..],
        &["pipeline", "--messages", "0"],
        &["pipeline", "--rounds", "0"],
        &["latency", "--rate", "many"],
        &["stored", "--stored", "0"],
        &[],
    ] {
        let refused = bench(wrong);
        assert_eq!(refused.status.code(), Some(2), "{wrong:?}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
}

#[test]
fn a_server_that_is_not_there_is_one_line_and_1() {
    let nowhere = [
        "--store",
        "postgres://me@127.0.0.1:1/none",
        "--broker",
        "amqp://127.0.0.1:1",
    ];
    let failed = bench(&[&["pipeline", "--anyway"], &nowhere[..]].concat());
    assert_eq!(failed.status.code(), Some(1));
    let said = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(
        said.starts_with("error: cannot connect to PostgreSQL"),
        "{said}"
    );
}

#[test]
fn a_store_that_somebody_uses_is_one_line_and_1() {
    // The tests beside this one use it, and this connection does in any case.
    let store = std::env::var("HANDFAST_TEST_POSTGRES").unwrap();
    let broker = std::env::var("HANDFAST_TEST_AMQP").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _used = runtime.block_on(async {
        use sqlx::Connection as _;
        sqlx::PgConnection::connect(&store).await.unwrap()
    });
    let refused = bench(&["pipeline", "--store", &store, "--broker", &broker]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    // A machine with much to do is refused before that.
    let in_use = said.contains("PostgreSQL is in use");
    assert!(in_use || said.contains("the load average is"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}
