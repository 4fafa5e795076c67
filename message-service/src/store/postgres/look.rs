//! What is due, for whom, in one statement: each replica asks it once a second.

use std::collections::BTreeSet;

use super::marks::Marks;
use super::rows::{at, get, maybe_at};
use super::session::Session;
use super::time::{At, span};
use crate::store::{Due, LOOK_AHEAD};

/// Along the indexes of claims, from the marks on where there are some, and not further than is asked
/// for: what is due later is of no use here.
pub(super) const LOOK: &str = "-- what is due
    WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
    SELECT 'subscription' AS whose, s.name, t.now,
           least(
           (SELECT due_at FROM delivery WHERE subscription = s.name AND state = 'PENDING'
               AND stream_ends = 0 AND (token IS NOT NULL)::int = 0
               AND due_at >= s.floor AND due_at <= t.now + $4 ORDER BY due_at LIMIT 1),
           (SELECT due_at FROM delivery WHERE subscription = s.name AND state = 'PENDING'
               AND stream_ends = 0 AND (token IS NOT NULL)::int = 1
               AND due_at >= s.floor AND due_at <= t.now + $4 ORDER BY due_at LIMIT 1)
           ) AS due,
           least(
           (SELECT due_at FROM delivery WHERE subscription = s.name AND state = 'PENDING'
               AND stream_ends > 0 AND (token IS NOT NULL)::int = 0
               AND due_at <= t.now + $4 ORDER BY due_at LIMIT 1),
           (SELECT due_at FROM delivery WHERE subscription = s.name AND state = 'PENDING'
               AND stream_ends > 0 AND (token IS NOT NULL)::int = 1
               AND due_at <= t.now + $4 ORDER BY due_at LIMIT 1)
           ) AS alone,
           (SELECT due_at FROM delivery WHERE subscription = s.name AND state = 'SENT'
               AND due_at <= t.now + $4 ORDER BY due_at LIMIT 1) AS silent
      FROM unnest($1::text[], $2::timestamptz[]) AS s(name, floor), t
    UNION ALL
    SELECT 'producer', p.name, t.now,
           least(
           (SELECT check_at FROM message WHERE producer = p.name AND state = 'PREPARED'
               AND (check_token IS NOT NULL)::int = 0
               AND check_at <= t.now + $4 ORDER BY check_at LIMIT 1),
           (SELECT check_at FROM message WHERE producer = p.name AND state = 'PREPARED'
               AND (check_token IS NOT NULL)::int = 1
               AND check_at <= t.now + $4 ORDER BY check_at LIMIT 1)
           ), NULL, NULL
      FROM unnest($3::text[]) AS p(name), t";

/// Looks once.
pub(super) async fn look(
    db: &mut Session,
    marks: &Marks,
    subscriptions: &BTreeSet<String>,
    producers: &BTreeSet<String>,
) -> Result<Due, sqlx::Error> {
    let names: Vec<&str> = subscriptions.iter().map(String::as_str).collect();
    let from: Vec<_> = names.iter().map(|name| marks.look_from(name)).collect();
    let floors: Vec<_> = from.iter().map(|from| At(from.floor)).collect();
    let producers: Vec<&str> = producers.iter().map(String::as_str).collect();
    let rows = db
        .fetch(LOOK, |query| {
            query
                .bind(&names)
                .bind(&floors)
                .bind(&producers)
                .bind(span(LOOK_AHEAD))
        })
        .await?;
    let mut due = Due::default();
    for row in &rows {
        let (whose, name): (&str, &str) = (get(row, "whose")?, get(row, "name")?);
        let (now, oldest) = (at(row, "now")?, maybe_at(row, "due")?);
        if whose == "producer" {
            due.note(now, oldest, name, |due| &mut due.checks);
            continue;
        }
        due.note(now, oldest, name, |due| &mut due.to_send);
        let (alone, silent) = (maybe_at(row, "alone")?, maybe_at(row, "silent")?);
        due.note(now, alone, name, |due| &mut due.alone);
        due.note(now, silent, name, |due| &mut due.overdue);
        // The names are sorted, as the set was.
        if let Ok(place) = names.binary_search(&name) {
            marks.mark(name, from[place], now, oldest);
        }
    }
    Ok(due)
}
