//! What is due, and for whom.

use std::collections::BTreeSet;

use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::rows::error;
use crate::message::Timestamp;
use crate::store::{Due, Error};

/// What is attempted, for errors.
const DOING: &str = "look for what is due";

/// Looks once.
pub(super) async fn look(
    db: &mut SqliteConnection,
    subscriptions: BTreeSet<String>,
    producers: BTreeSet<String>,
    now: Timestamp,
) -> Result<Due, Error> {
    let mut due = Due::default();
    for name in &subscriptions {
        let row = sqlx::query(
            "-- what is due of a subscription
             SELECT (SELECT min(due_at) FROM delivery WHERE subscription = ?1
                        AND state = 'PENDING' AND stream_ends = 0) AS due,
                    (SELECT min(due_at) FROM delivery WHERE subscription = ?1
                        AND state = 'PENDING' AND stream_ends > 0) AS alone,
                    (SELECT min(due_at) FROM delivery WHERE subscription = ?1
                        AND state = 'SENT') AS silent",
        )
        .bind(name)
        .fetch_one(&mut *db)
        .await
        .map_err(error(DOING))?;
        due.note(now, time(&row, 0)?, name, |due| &mut due.to_send);
        due.note(now, time(&row, 1)?, name, |due| &mut due.alone);
        due.note(now, time(&row, 2)?, name, |due| &mut due.overdue);
    }
    for name in &producers {
        let row = sqlx::query(
            "-- what is to be checked of a producer
             SELECT min(check_at) FROM message WHERE producer = ? AND state = 'PREPARED'",
        )
        .bind(name)
        .fetch_one(&mut *db)
        .await
        .map_err(error(DOING))?;
        due.note(now, time(&row, 0)?, name, |due| &mut due.checks);
    }
    Ok(due)
}

fn time(row: &SqliteRow, column: usize) -> Result<Option<Timestamp>, Error> {
    let micros: Option<i64> = row.try_get(column).map_err(error(DOING))?;
    Ok(micros.map(Timestamp::from_micros))
}
