//! What a person, or a program, is told at the beginning and at the end.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::engines::Timers;
use super::home::Home;
use super::plan::{Plan, Role};
use super::tally::{Fallen, Tally};
use super::verdict::Verdict;

/// What is going to be tried.
pub(crate) fn opening(plan: &Plan, home: &Home) -> String {
    let orders = plan.orders.len();
    let Timers {
        check_after_ms,
        publisher_confirm_ms,
        handler_ms,
        lease_ms,
        resend_after_ms,
        step_ms,
        passed_by_ms,
        start_grace_ms,
    } = home.engines().timers();
    let mut text = format!(
        "Handfast demo: {orders} payments while every process is killed.\n\
         \n\
         \x20 payment takes the money and tells the service; accounting writes a voucher and\n\
         \x20 points grants points, for what was paid and for nothing else. Each of the four is\n\
         \x20 a process with a database of its own, in {folder}.\n\
         \n\
         \x20 engines  {engines}\n\
         \x20 seed     {seed}  (repeat this plan: handfast demo {arguments})\n\
         \x20 orders   {too_much} cost more than the user has; {repeated} are asked for again\n\
         \x20 timers   shortened: status check after {check_after_ms} ms, publisher confirm \
         {publisher_confirm_ms} ms,\n\
         \x20          handler {handler_ms} ms, lease {lease_ms} ms, resend after \
         {resend_after_ms} ms, every step {step_ms} ms,\n\
         \x20          passed by {passed_by_ms} ms, quiet after a start {start_grace_ms} ms\n",
        engines = home.engines().shown(),
        folder = home.path().display(),
        seed = plan.seed,
        arguments = plan.arguments(),
        too_much = plan.too_much(),
        repeated = plan.repeated(),
    );
    for role in Role::ALL {
        let mut title = role.name();
        for life in plan.lives(role) {
            let when = match life.at {
                None => "when it comes to it".to_owned(),
                Some(at) => format!("by payment {at} of {orders}"),
            };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {title:<10} {}, {when}", life.death);
            title = "";
        }
    }
    text
}

/// What came out, as a table.
pub(crate) fn table(plan: &Plan, tally: &Tally, verdict: &Verdict, elapsed_s: f64) -> String {
    let n = &verdict.numbers;
    let effects = n.accounting_effects + n.points_effects;
    let mut text = String::from("\nWhat was killed (after how many settled orders)\n");
    for role in Role::ALL {
        let fallen = tally.fallen();
        let theirs = fallen.iter().filter(|fallen| fallen.role == role);
        let ways: Vec<String> = theirs.map(way).collect();
        let _ = writeln!(
            text,
            "  {role:<10} {:>6} times   {}",
            tally.kills(role),
            ways.join(", ")
        );
    }
    if tally.cuts() > 0 {
        let _ = writeln!(
            text,
            "  {:<10} {:>6} times   every connection was cut",
            "RabbitMQ",
            tally.cuts()
        );
    }
    let mut section = |title: &str, rows: &[(&str, i64, String)]| {
        let _ = writeln!(text, "{title}");
        for (name, value, note) in rows {
            let line = format!("  {name:<10} {value:>6} {note}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
    };
    section(
        "What was tried",
        &[
            ("orders", plan.orders.len() as i64, String::new()),
            (
                "tries",
                n.attempted,
                format!(
                    "to pay them: {} committed, {} rolled back or cut off by a death",
                    n.committed, n.rolled_back
                ),
            ),
        ],
    );
    section(
        "What came out",
        &[
            (
                "messages",
                n.prepared,
                "prepared before their payment was committed".to_owned(),
            ),
            (
                "confirmed",
                n.confirmed_by_producer + n.confirmed_by_check,
                format!(
                    "of them {} only because the service asked",
                    n.confirmed_by_check
                ),
            ),
            (
                "cancelled",
                n.cancelled_by_producer + n.cancelled_by_check,
                format!(
                    "of them {} only because the service asked",
                    n.cancelled_by_check
                ),
            ),
            ("vouchers", n.accounting_effects, "by accounting".to_owned()),
            ("grants", n.points_effects, "by points".to_owned()),
            (
                "deliveries",
                n.deliveries,
                format!(
                    "= {effects} effects + {} repeats that the inboxes absorbed",
                    n.duplicates_absorbed
                ),
            ),
        ],
    );
    section(
        "What must be zero",
        &[
            (
                "lost",
                n.lost,
                "paid, but not booked or not rewarded".to_owned(),
            ),
            (
                "phantom",
                n.phantom,
                "booked or rewarded, but not paid".to_owned(),
            ),
            (
                "doubled",
                n.doubled,
                "paid, booked or rewarded twice".to_owned(),
            ),
            (
                "unbalanced",
                n.unbalanced,
                "vouchers that do not sum to zero".to_owned(),
            ),
            (
                "unfinished",
                n.unfinished,
                "left undecided or undelivered".to_owned(),
            ),
        ],
    );
    let _ = if verdict.complaints.is_empty() {
        writeln!(
            text,
            "\nIt adds up: every number was read from the databases. {elapsed_s:.1} s"
        )
    } else {
        writeln!(text, "\nIt does NOT add up. {elapsed_s:.1} s")
    };
    text
}

fn way(fallen: &Fallen) -> String {
    match fallen.at {
        Some(point) => format!("{point} ({})", fallen.settled),
        None => format!("SIGKILL ({})", fallen.settled),
    }
}

/// What came out, as one object.
pub(crate) fn object(plan: &Plan, tally: &Tally, verdict: &Verdict, elapsed_s: f64) -> Value {
    let n = &verdict.numbers;
    json!({
        "seed": plan.seed,
        "attempted": n.attempted,
        "committed": n.committed,
        "rolled_back": n.rolled_back,
        "prepared": n.prepared,
        "confirmed_by_producer": n.confirmed_by_producer,
        "confirmed_by_check": n.confirmed_by_check,
        "cancelled_by_producer": n.cancelled_by_producer,
        "cancelled_by_check": n.cancelled_by_check,
        "accounting_effects": n.accounting_effects,
        "points_effects": n.points_effects,
        "deliveries": n.deliveries,
        "duplicates_absorbed": n.duplicates_absorbed,
        "service_kills": tally.kills(Role::Service),
        "producer_kills": tally.kills(Role::Payment),
        "consumer_kills": tally.kills(Role::Accounting) + tally.kills(Role::Points),
        "connection_cuts": tally.cuts(),
        "lost": n.lost,
        "phantom": n.phantom,
        "doubled": n.doubled,
        "unbalanced": n.unbalanced,
        "unfinished": n.unfinished,
        "elapsed_s": (elapsed_s * 10.0).round() / 10.0,
    })
}
