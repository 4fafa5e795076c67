//! Claims and results of status checks.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::Rng as _;
use uuid::Uuid;

use super::decisions::moves;
use super::lists;
use super::messages::{event, stored};
use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::policy::Chance;
use crate::message::{CheckPolicy, Effect, MessageEvent, MessageId};
use crate::store::{CheckClaim, CheckResult, DecidedBy, Error};

/// Draws a number for jitter.
pub(super) fn chance(tx: &mut Tx) -> Chance {
    Chance::new(tx.rng.random_range(-1.0..=1.0))
}

/// Draws the token of a lease.
pub(super) fn token(tx: &mut Tx) -> Uuid {
    uuid::Builder::from_random_bytes(tx.rng.random()).into_uuid()
}

pub(super) async fn claim(
    tx: &mut Tx,
    (producer, limit, lease): &(String, usize, Duration),
) -> Result<Vec<CheckClaim>, Error> {
    let doing = Kind::ClaimChecks.doing();
    let rows = sqlx::query(
        "-- claim checks
         SELECT id, topic, key, fence, prepared_at, checks FROM message
          WHERE producer = ? AND state = 'PREPARED' AND check_at <= ?
          ORDER BY check_at LIMIT ?",
    )
    .bind(producer)
    .bind(tx.now.as_micros())
    .bind(i64::try_from(*limit).unwrap_or(i64::MAX))
    .fetch_all(&mut tx.db)
    .await
    .map_err(error(doing))?;
    // One token serves the whole claim: a lease is lost row by row, but taken together.
    let token = token(tx);
    let mut claims = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns = Columns::new(row, doing);
        claims.push(CheckClaim {
            id: columns.id("id")?,
            token,
            topic: columns.get("topic")?,
            key: columns.get("key")?,
            fence: columns.uuid("fence")?,
            prepared_at: columns.time("prepared_at")?,
            checks: columns.count("checks")?,
        });
    }
    if claims.is_empty() {
        return Ok(claims);
    }
    sqlx::query(
        "-- lease checks
         UPDATE message SET check_at = ?2, check_token = ?3
          WHERE id IN (SELECT unhex(value) FROM json_each(?1))",
    )
    .bind(lists::ids(claims.iter().map(|claim| claim.id)))
    .bind(tx.now.after(*lease).as_micros())
    .bind(&token.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(claims)
}

pub(super) async fn settle(
    tx: &mut Tx,
    (_, check_after, results): &(String, Duration, Vec<(CheckClaim, CheckResult)>),
) -> Result<(BTreeSet<String>, usize), Error> {
    let policy = CheckPolicy {
        check_after: *check_after,
    };
    let mut topics = BTreeSet::new();
    let mut settled = 0;
    for (claim, result) in results {
        let wrote = match result {
            CheckResult::Committed => {
                verdict(tx, claim, MessageEvent::Confirm, &mut topics).await?
            }
            CheckResult::RolledBack => {
                verdict(tx, claim, MessageEvent::Cancel, &mut topics).await?
            }
            CheckResult::Undecided { in_progress } => {
                undecided(tx, claim, &policy, *in_progress).await?
            }
            CheckResult::Unanswered { retry_after } => unanswered(tx, claim, *retry_after).await?,
        };
        settled += usize::from(wrote);
    }
    Ok((topics, settled))
}

/// Makes the next check due now. An in-flight check is not disturbed.
pub(super) async fn check_now(tx: &mut Tx, (id,): &(MessageId,)) -> Result<bool, Error> {
    let doing = Kind::ClaimChecks.doing();
    let prepared: Option<i64> = sqlx::query_scalar(
        "-- is it prepared\nSELECT 1 FROM message WHERE id = ? AND state = 'PREPARED'",
    )
    .bind(&id.as_bytes()[..])
    .fetch_optional(&mut tx.db)
    .await
    .map_err(error(doing))?;
    sqlx::query(
        "-- check now
         UPDATE message SET check_at = min(check_at, ?)
          WHERE id = ? AND state = 'PREPARED' AND check_token IS NULL",
    )
    .bind(tx.now.as_micros())
    .bind(&id.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(prepared.is_some())
}

/// Writes a verdict, if the lease still holds: the producer's own word may have come first.
async fn verdict(
    tx: &mut Tx,
    claim: &CheckClaim,
    decided: MessageEvent,
    topics: &mut BTreeSet<String>,
) -> Result<bool, Error> {
    let doing = Kind::SettleChecks.doing();
    if !holds(tx, claim).await? {
        return Ok(false);
    }
    let Some(stored) = stored(tx, [claim.id], doing).await?.remove(&claim.id) else {
        return Ok(false);
    };
    match stored.state.apply(decided) {
        Ok(Effect::Moves(next)) => {
            count(tx, claim).await?;
            let moved = vec![(claim.id, stored, next)];
            moves(tx, moved, DecidedBy::Check, doing, topics).await?;
            let verdict = match decided {
                MessageEvent::Confirm | MessageEvent::Publish => "COMMITTED",
                MessageEvent::Cancel | MessageEvent::Prepare => "ROLLED_BACK",
            };
            event(tx, claim.id, "check", verdict, doing).await?;
            Ok(true)
        }
        Ok(Effect::AlreadySo) | Err(_) => Ok(false),
    }
}

async fn undecided(
    tx: &mut Tx,
    claim: &CheckClaim,
    policy: &CheckPolicy,
    in_progress: bool,
) -> Result<bool, Error> {
    let doing = Kind::SettleChecks.doing();
    if !holds(tx, claim).await? {
        return Ok(false);
    }
    count(tx, claim).await?;
    let checks = claim.checks + 1;
    let wait = policy.step(checks, chance(tx));
    let unresolved = checks >= CheckPolicy::UNRESOLVED_AFTER_CHECKS;
    sqlx::query(
        "-- check again later
         UPDATE message SET check_at = ?, check_token = NULL, unresolved = unresolved OR ?
          WHERE id = ? AND check_token = ?",
    )
    .bind(tx.now.after(wait).as_micros())
    .bind(unresolved)
    .bind(&claim.id.as_bytes()[..])
    .bind(&claim.token.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    let answer = if in_progress {
        "IN_PROGRESS"
    } else {
        "UNKNOWN"
    };
    event(tx, claim.id, "check", answer, doing).await?;
    if checks == CheckPolicy::UNRESOLVED_AFTER_CHECKS {
        let detail = format!("{checks} answered checks brought no verdict");
        event(tx, claim.id, "unresolved", &detail, doing).await?;
    }
    Ok(true)
}

async fn unanswered(tx: &mut Tx, claim: &CheckClaim, retry_after: Duration) -> Result<bool, Error> {
    let done = sqlx::query(
        "-- return a check
         UPDATE message SET check_at = ?, check_token = NULL
          WHERE id = ? AND check_token = ? AND state = 'PREPARED'",
    )
    .bind(tx.now.after(retry_after).as_micros())
    .bind(&claim.id.as_bytes()[..])
    .bind(&claim.token.as_bytes()[..])
    .execute(&mut tx.db)
    .await
    .map_err(error(Kind::SettleChecks.doing()))?;
    Ok(done.rows_affected() == 1)
}

async fn holds(tx: &mut Tx, claim: &CheckClaim) -> Result<bool, Error> {
    let held: Option<i64> = sqlx::query_scalar(
        "-- does the lease hold
         SELECT 1 FROM message WHERE id = ? AND check_token = ? AND state = 'PREPARED'",
    )
    .bind(&claim.id.as_bytes()[..])
    .bind(&claim.token.as_bytes()[..])
    .fetch_optional(&mut tx.db)
    .await
    .map_err(error(Kind::SettleChecks.doing()))?;
    Ok(held.is_some())
}

async fn count(tx: &mut Tx, claim: &CheckClaim) -> Result<(), Error> {
    sqlx::query("-- count an answered check\nUPDATE message SET checks = checks + 1 WHERE id = ?")
        .bind(&claim.id.as_bytes()[..])
        .execute(&mut tx.db)
        .await
        .map_err(error(Kind::SettleChecks.doing()))?;
    Ok(())
}
