//! Every mode runs and counts; how fast is nobody's business here.

#![expect(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
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
    for run in ["bare", "handfast"] {
        let wal = said["used"][0][run]["wal_bytes_per_message"].as_f64();
        // The body alone is written once at least.
        assert!(wal.unwrap() > 1_024.0, "{said}");
    }
    assert_eq!(said["servers"]["postgresql"]["fsync"], "on");
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
fn a_wrong_call_is_one_line_and_2() {
    for wrong in [
        &["pipelime"][..],
        &["pipeline", "--messages", "0"],
        &["pipeline", "--rounds", "0"],
        &["latency", "--rate", "many"],
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
