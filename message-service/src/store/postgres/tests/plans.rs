//! How the database does what the hot statements ask for.

use super::super::{answers, checks, decisions, deliveries, look, outcomes, session};
use super::*;

/// The plan that stays in use whatever the arguments are, one step per line.
async fn plan(db: &mut PgConnection, sql: &str, arguments: &str) -> String {
    run(db, &format!("PREPARE hot {sql}")).await;
    let lines: Vec<String> =
        sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN EXECUTE hot({arguments})")))
            .persistent(false)
            .fetch_all(&mut *db)
            .await
            .unwrap();
    run(db, "DEALLOCATE hot").await;
    lines.join("\n")
}

#[tokio::test]
async fn hot_statements_walk_along_an_index() {
    let harness = ready().await;
    assert_plans(&harness, "nothing is known").await;
    // A plan that is made while the statistics know a small table stays in use while it grows.
    let mut rows: u128 = 0;
    for more in [1, 10, 200] {
        for n in rows..rows + more {
            let written = harness.store.prepare(vec![paid(3 * n)], CHECK_AFTER).await;
            written.unwrap();
            for (n, handoff) in [(3 * n + 1, Handoff::default()), (3 * n + 2, room(1))] {
                let written = harness.store.publish(vec![paid(n)], handoff).await;
                written.unwrap();
            }
        }
        rows += more;
        harness.run("ANALYZE").await;
        assert_plans(&harness, &format!("{rows} of each kind are known")).await;
    }
}

/// Leases for so many.
fn room(most: usize) -> Handoff {
    Handoff {
        lease: LEASE,
        room: [("accounting".to_owned(), most)].into(),
    }
}

async fn assert_plans(harness: &OnPostgres, when: &str) {
    let mut db = session::connect(&harness.database.options(), Use::Write)
        .await
        .unwrap();
    run(&mut db, "SET plan_cache_mode = force_generic_plan").await;
    let claim = "'s', 9::bigint, '30 s'::interval, 9::bigint, '-infinity'::timestamptz, \
                 gen_random_uuid()";
    let normal = deliveries::claim_sql(deliveries::Which::Normal);
    let fresh = deliveries::claim_sql(deliveries::Which::Fresh);
    let alone = deliveries::claim_sql(deliveries::Which::Alone);
    let decide = decisions::decide_sql();
    let checks_claim = checks::claim_sql();
    let typed = |types: &str, sql: &str| format!("{types} AS {sql}");
    let claim_types = "(text, bigint, interval, bigint, timestamptz, uuid)";
    for (types, sql, arguments, indexes) in [
        (
            claim_types,
            normal.as_str(),
            claim,
            &["delivery_to_send", "message_pkey", "delivery_pkey"][..],
        ),
        (claim_types, &fresh, claim, &["delivery_to_send"]),
        (claim_types, &alone, claim, &["delivery_to_send_alone"]),
        (
            "(text, timestamptz, interval)",
            deliveries::NEXT_DUE,
            "'s', '-infinity', '1 s'",
            &["delivery_to_send", "delivery_to_send_alone"],
        ),
        (
            // Asked on connections that plan each time; this says that the indexes are enough for it.
            "(text[], timestamptz[], text[], interval)",
            look::LOOK,
            "'{}', '{}', '{}', '1 s'",
            &[
                "delivery_to_send",
                "delivery_to_send_alone",
                "delivery_silent",
                "message_to_check",
            ],
        ),
        (
            "(text, bigint, interval, uuid)",
            &checks_claim,
            "'p', 9, '30 s', gen_random_uuid()",
            &["message_to_check", "message_pkey"],
        ),
        (
            "(uuid[], text[], text[], text[], bigint[], interval, uuid)",
            &decide,
            "'{}', '{}', '{}', '{}', '{}', '30 s', gen_random_uuid()",
            &["message_pkey"],
        ),
        (
            "(uuid[], uuid[], text[])",
            checks::DECIDE,
            "'{}', '{}', '{}'",
            &["message_pkey"],
        ),
        (
            "(uuid[], text[], uuid[], interval[])",
            deliveries::MARK_SENT,
            "'{}', '{}', '{}', '{}'",
            &["delivery_pkey"],
        ),
        (
            "(uuid[], text[])",
            answers::CONSUME,
            "'{}', '{}'",
            &["delivery_pkey"],
        ),
        (
            "(uuid[], text[], text[], uuid[], bigint[], bigint[], bigint[], text[], \
              timestamptz[], bigint[], bigint[], bigint[], text[], uuid[], text[], text[], text[])",
            outcomes::WRITE,
            "'{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', \
             '{}', '{}', '{}'",
            &["delivery_pkey"],
        ),
    ] {
        let plan = plan(&mut db, &typed(types, sql), arguments).await;
        for index in indexes {
            let used = plan.contains(&format!(" using {index} "));
            assert!(used, "{when}: {plan}");
        }
        for table in ["message", "delivery"] {
            let read = plan.contains(&format!("Seq Scan on {table} "));
            assert!(!read, "{when}: {plan}");
        }
        let mut steps: Vec<_> = plan.lines().collect();
        steps.push("");
        for (step, next) in steps.iter().zip(steps.iter().skip(1)) {
            // What is due is found along the index, not filtered out of it.
            let is_filtered = step.contains("Filter:") && step.contains("due_at");
            assert!(!is_filtered, "{when}: {plan}");
            // Nor is the whole of one read for each batch.
            let along = step.contains(" on message ") || step.contains(" on delivery ");
            let read = along && step.contains(" using ") && !next.contains("Index Cond:");
            assert!(!read, "{when}: {plan}");
        }
        if sql.contains("SKIP LOCKED") {
            let sorted =
                plan.contains("Sort Key: d.due_at") || plan.contains("Sort Key: m.check_at");
            assert!(!sorted, "{when}: {plan}");
        }
        if sql.contains("AS i(id") {
            // What is known by its id is looked up by it.
            let others = [
                "message_to_",
                "message_marked",
                "delivery_to_",
                "delivery_silent",
            ];
            let others = others.map(|index| format!(" using {index}"));
            assert!(
                !others.iter().any(|index| plan.contains(index)),
                "{when}: {plan}"
            );
        }
    }
}
