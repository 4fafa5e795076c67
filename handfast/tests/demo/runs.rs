//! Runs that are carried through: they add up, and leave nothing but what is to be kept.

use crate::process::{demo, is_empty, output, result, stderr};
use crate::servers::{databases, deployment, has_queue, servers};

#[tokio::test]
async fn a_small_run_on_servers_adds_up_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (store, broker) = servers();
    let arguments = [
        "--payments",
        "60",
        "--seed",
        "4",
        "--json",
        "--store",
        &store,
        "--broker",
        &broker,
    ];
    let output = output(demo(&arguments, dir.path()));
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    let result = result(&output);
    for zero in ["lost", "phantom", "doubled", "unbalanced", "unfinished"] {
        assert_eq!(result[zero].as_i64(), Some(0), "{zero} in {result}");
    }
    assert_eq!(result["committed"].as_i64(), Some(57), "{result}");
    assert_eq!(result["accounting_effects"].as_i64(), Some(57), "{result}");
    assert_eq!(result["points_effects"].as_i64(), Some(57), "{result}");
    assert_eq!(result["connection_cuts"].as_i64(), Some(2), "{result}");
    let again = "--payments 60 --seed 4 --store postgres://… --broker amqp://…";
    assert!(said.contains(again), "{said}");
    let deployment = deployment(&said);
    assert_eq!(databases(&store, deployment).await, [""; 0]);
    let has_queue = has_queue(&broker, deployment).await;
    assert!(!has_queue, "queues {deployment}.… are left");
}

#[test]
fn a_small_run_adds_up_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--payments", "60", "--seed", "4", "--json"];
    let output = output(demo(&arguments, dir.path()));
    assert!(output.status.success(), "{}", stderr(&output));
    let result = result(&output);
    let number = |name: &str| {
        let value = result[name].as_i64();
        value.unwrap_or_else(|| panic!("{name} is not an integer in {result}"))
    };
    for zero in ["lost", "phantom", "doubled", "unbalanced", "unfinished"] {
        assert_eq!(number(zero), 0, "{result}");
    }
    let confirmed = number("confirmed_by_producer") + number("confirmed_by_check");
    let cancelled = number("cancelled_by_producer") + number("cancelled_by_check");
    let effects = number("accounting_effects") + number("points_effects");
    assert_eq!(number("committed"), 57, "{result}");
    assert_eq!(number("committed"), confirmed);
    assert_eq!(number("prepared"), confirmed + cancelled);
    assert_eq!(
        number("attempted"),
        number("committed") + number("rolled_back")
    );
    assert_eq!(effects, 2 * confirmed);
    assert_eq!(
        number("deliveries"),
        effects + number("duplicates_absorbed")
    );
    for party in ["service_kills", "producer_kills", "consumer_kills"] {
        assert!(number(party) >= 2, "{party} in {result}");
    }
    assert!(result["elapsed_s"].as_f64().is_some_and(|s| s > 0.0));
    assert!(is_empty(dir.path()), "files are left");
}

#[test]
fn what_is_to_be_kept_is_kept_and_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let keep = dir.path().join("kept");
    let arguments = ["--payments", "1", "--keep", keep.to_str().unwrap()];
    let first = output(demo(&arguments, dir.path()));
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(String::from_utf8_lossy(&first.stdout).contains("It adds up"));
    for party in ["service", "payment", "accounting", "points"] {
        assert!(keep.join(format!("{party}.db")).exists(), "{party}");
    }
    let again = output(demo(&arguments, dir.path()));
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(stderr(&again).lines().count(), 1, "{}", stderr(&again));
    assert!(stderr(&again).contains("former run"));
}
