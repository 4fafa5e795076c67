//! Whose turn it is to run a pass that one process runs for all.

use std::time::Duration;

use super::lanes::{Replies, Work};
use super::rows::get;
use super::session::{Session, Trouble, trouble};
use super::time::span;
use crate::store::TakeTurn;
use crate::store::kind::Kind;

/// The lane of turns.
pub(super) struct Turns;

impl Work for Turns {
    type Call = TakeTurn;
    /// After how long to ask again, if somebody else has the turn.
    type Reply = Option<Duration>;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Turn
    }

    fn size(_: &TakeTurn) -> (usize, usize) {
        (1, 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[TakeTurn],
    ) -> Result<Replies<Option<Duration>>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            replies.push(Ok(match take(db, call).await {
                // Somebody takes it at this moment, and his commit is slow.
                Err(error) if trouble(&error) == Trouble::Locked => Some(call.period),
                taken => taken?,
            }));
        }
        Ok(replies)
    }
}

async fn take(db: &mut Session, turn: &TakeTurn) -> Result<Option<Duration>, sqlx::Error> {
    // A statement of its own asks when the next turn is: what the first one sees is older than
    // the row that it may have waited for.
    let taken = db
        .fetch(
            "-- take a turn
             WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
             UPDATE turn SET due_at = t.now + $3, taken_by = $2,
                    taken = taken + CASE WHEN $4 THEN 0 ELSE 1 END
               FROM t
              WHERE pass = $1
                AND CASE WHEN $4 THEN taken_by = $2
                         ELSE due_at <= t.now OR due_at > t.now + 2 * $3 END
             RETURNING pass",
            |query| {
                query
                    .bind(turn.pass.name())
                    .bind(turn.replica)
                    .bind(span(turn.period))
                    .bind(turn.again)
            },
        )
        .await?;
    if !taken.is_empty() {
        return Ok(None);
    }
    let rows = db
        .fetch(
            "-- when is the next turn
             SELECT CAST(extract(epoch FROM due_at - clock_timestamp()) AS float8) AS seconds
               FROM turn WHERE pass = $1",
            |query| query.bind(turn.pass.name()),
        )
        .await?;
    let Some(row) = rows.first() else {
        return first(db, turn).await;
    };
    let until = Duration::try_from_secs_f64(get(row, "seconds")?);
    // What is due by now somebody else may have taken; a clock that jumps is not waited for.
    Ok(Some(until.unwrap_or_default().min(turn.period)))
}

/// The pass was never due before: it is from now on, for whoever asks first.
async fn first(db: &mut Session, turn: &TakeTurn) -> Result<Option<Duration>, sqlx::Error> {
    db.fetch(
        "-- a pass is due for the first time
         INSERT INTO turn (pass, due_at) VALUES ($1, to_timestamp(0))
         ON CONFLICT (pass) DO NOTHING",
        |query| query.bind(turn.pass.name()),
    )
    .await?;
    Ok(Some(Duration::ZERO))
}
