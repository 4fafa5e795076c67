//! Claims and results of status checks.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::lanes::{Replies, Work};
use super::rows::{at, count, get, id, long, uuid};
use super::session::Session;
use super::time::span;
use crate::message::policy::Chance;
use crate::message::{CheckPolicy, MessageId, MessageState};
use crate::store::kind::Kind;
use crate::store::{CheckClaim, CheckResult};

/// What is wanted of messages that wait for their check.
pub(super) enum Due {
    /// Those of this producer that are due.
    Claim(String, usize, Duration),
    /// To make this one due.
    Now(MessageId),
}

/// What came of it.
pub(super) enum DueReply {
    Claims(Vec<CheckClaim>),
    IsPrepared(bool),
}

/// The lane of claims of checks.
pub(super) struct ClaimChecks(pub(super) StdRng);

impl Work for ClaimChecks {
    type Call = Due;
    type Reply = DueReply;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::ClaimChecks
    }

    fn size(call: &Due) -> (usize, usize) {
        match call {
            Due::Claim(_, limit, _) => (*limit, 0),
            Due::Now(_) => (1, 0),
        }
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Due],
    ) -> Result<Replies<DueReply>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            replies.push(Ok(match call {
                Due::Claim(producer, limit, lease) => {
                    // One token serves the whole claim: a lease is lost row by row, but taken
                    // together.
                    let token = uuid::Builder::from_random_bytes(self.0.random()).into_uuid();
                    DueReply::Claims(claim(db, producer, *limit, *lease, token).await?)
                }
                Due::Now(id) => DueReply::IsPrepared(check_now(db, *id).await?),
            }));
        }
        Ok(replies)
    }
}

async fn claim(
    db: &mut Session,
    producer: &str,
    limit: usize,
    lease: Duration,
    token: Uuid,
) -> Result<Vec<CheckClaim>, sqlx::Error> {
    let sql = claim_sql();
    let rows = db
        .fetch(&sql, |query| {
            query
                .bind(producer)
                .bind(long(limit))
                .bind(span(lease))
                .bind(token)
        })
        .await?;
    rows.iter()
        .map(|row| {
            Ok(CheckClaim {
                id: id(row, "id")?,
                token,
                topic: get(row, "topic")?,
                key: get(row, "key")?,
                fence: get(row, "fence")?,
                prepared_at: at(row, "prepared_at")?,
                checks: count(row, "checks")?,
            })
        })
        .collect()
}

/// As the statement of a claim of deliveries.
pub(super) fn claim_sql() -> String {
    let part = |leased: u8, due: &str| {
        format!(
            "SELECT m.id, m.check_at FROM message m
              WHERE m.producer = $1 AND m.state = 'PREPARED'
                AND (m.check_token IS NOT NULL)::int = {leased} AND {due}
              ORDER BY m.check_at LIMIT $2 FOR UPDATE OF m SKIP LOCKED"
        )
    };
    let (free, expired, far) = (
        part(0, "m.check_at <= (SELECT now FROM t)"),
        part(1, "m.check_at <= (SELECT now FROM t)"),
        part(1, "m.check_at > (SELECT now FROM t) + 2 * $3"),
    );
    format!(
        "-- claim checks
         WITH t AS MATERIALIZED (
             SELECT clock_timestamp() AS now
         ), free AS MATERIALIZED (
             {free}
         ), expired AS MATERIALIZED (
             {expired}
         ), far AS MATERIALIZED (
             {far}
         ), due AS MATERIALIZED (
             SELECT * FROM (SELECT * FROM free UNION ALL SELECT * FROM expired
                            UNION ALL SELECT * FROM far) AS u
              ORDER BY check_at, id LIMIT $2
         ), leased AS (
             UPDATE message m SET check_at = clock_timestamp() + $3, check_token = $4
               FROM due d WHERE m.id = ANY (ARRAY[d.id])
             RETURNING m.id, m.topic, m.key, m.fence, m.prepared_at, m.checks,
                       d.check_at AS was_due
         )
         SELECT * FROM leased ORDER BY was_due, id"
    )
}

/// Makes the next check due now. An in-flight check is not disturbed.
async fn check_now(db: &mut Session, id: MessageId) -> Result<bool, sqlx::Error> {
    let rows = db
        .fetch(
            "-- check now
             WITH due AS (
                 UPDATE message SET check_at = least(check_at, clock_timestamp())
                  WHERE id = $1 AND state = 'PREPARED' AND check_token IS NULL
             )
             SELECT FROM message WHERE id = $1 AND state = 'PREPARED'",
            |query| query.bind(uuid(id)),
        )
        .await?;
    Ok(!rows.is_empty())
}

/// The lane of results of checks.
pub(super) struct SettleChecks(pub(super) StdRng);

impl Work for SettleChecks {
    type Call = (Duration, Vec<(CheckClaim, CheckResult)>);
    type Reply = (BTreeSet<String>, usize);

    fn kind(&self) -> Kind {
        Kind::SettleChecks
    }

    fn size((_, results): &Self::Call) -> (usize, usize) {
        (results.len(), 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Self::Reply>, sqlx::Error> {
        let (mut verdicts, mut later) = (Vec::new(), Vec::new());
        // A message has one lease, so one result: a second one of the same lease is none.
        let mut seen = HashSet::new();
        let mut owner = HashMap::new();
        for (call, (check_after, results)) in calls.iter().enumerate() {
            for (claim, result) in results {
                if !seen.insert((claim.id, claim.token)) {
                    continue;
                }
                owner.insert((uuid(claim.id), claim.token), call);
                match result {
                    CheckResult::Committed => verdicts.push((claim, MessageState::Confirmed)),
                    CheckResult::RolledBack => verdicts.push((claim, MessageState::Cancelled)),
                    CheckResult::Undecided { in_progress } => {
                        later.push(self.undecided(claim, *check_after, *in_progress));
                    }
                    CheckResult::Unanswered { retry_after } => {
                        later.push(Later::unanswered(claim, *retry_after));
                    }
                }
            }
        }
        let mut replies = vec![(BTreeSet::new(), 0); calls.len()];
        for (id, token, topic) in decide(db, &verdicts).await? {
            if let Some(call) = owner.get(&(id, token)) {
                replies[*call].1 += 1;
                replies[*call].0.extend(topic);
            }
        }
        for (id, token) in check_later(db, later).await? {
            if let Some(call) = owner.get(&(id, token)) {
                replies[*call].1 += 1;
            }
        }
        Ok(replies.into_iter().map(Ok).collect())
    }
}

impl SettleChecks {
    fn undecided(&mut self, claim: &CheckClaim, check_after: Duration, running: bool) -> Later {
        let policy = CheckPolicy { check_after };
        let checks = claim.checks.saturating_add(1);
        let chance = Chance::new(self.0.random_range(-1.0..=1.0));
        Later {
            id: claim.id,
            token: claim.token,
            wait: policy.step(checks, chance),
            counts: true,
            unresolved: checks >= CheckPolicy::UNRESOLVED_AFTER_CHECKS,
            answer: Some(if running { "IN_PROGRESS" } else { "UNKNOWN" }),
            flagged: (checks == CheckPolicy::UNRESOLVED_AFTER_CHECKS)
                .then(|| format!("{checks} answered checks brought no verdict")),
        }
    }
}

/// Writes verdicts whose lease still holds: the producer's own word may have come first.
async fn decide(
    db: &mut Session,
    verdicts: &[(&CheckClaim, MessageState)],
) -> Result<Vec<(Uuid, Uuid, Option<String>)>, sqlx::Error> {
    if verdicts.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<_> = verdicts.iter().map(|(claim, _)| uuid(claim.id)).collect();
    let tokens: Vec<_> = verdicts.iter().map(|(claim, _)| claim.token).collect();
    let states: Vec<_> = verdicts.iter().map(|(_, state)| state.as_str()).collect();
    let rows = db
        .fetch(DECIDE, |query| query.bind(&ids).bind(&tokens).bind(&states))
        .await?;
    rows.iter()
        .map(|row| Ok((get(row, "id")?, get(row, "token")?, get(row, "topic")?)))
        .collect()
}

pub(super) const DECIDE: &str = "-- write verdicts
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS i(id, token, state)
    ), locked AS MATERIALIZED (
        SELECT i.* FROM input i JOIN message m ON m.id = ANY (ARRAY[i.id])
         WHERE (m.state = 'PREPARED' AND m.check_token = i.token) IS TRUE
         ORDER BY i.id FOR UPDATE OF m /* waits */
    ), decided AS (
        UPDATE message m
           SET state = l.state, decided_at = clock_timestamp(), decided_by = 'CHECK',
               check_at = NULL, check_token = NULL, checks = m.checks + 1, unresolved = false,
               unsubscribed = l.state = 'CONFIRMED' AND NOT EXISTS (
                   SELECT FROM subscription s WHERE s.topic = m.topic AND s.active)
          FROM locked l WHERE m.id = ANY (ARRAY[l.id])
        RETURNING m.id, l.token, m.state, m.topic, m.deliver_after, m.decided_at
    ), deliveries AS (
        INSERT INTO delivery (message_id, subscription, state, due_at, confirmed_at)
        SELECT d.id, s.name, 'PENDING', greatest(d.deliver_after, d.decided_at), d.decided_at
          FROM decided d JOIN subscription s ON s.topic = d.topic AND s.active
         WHERE d.state = 'CONFIRMED'
         ORDER BY d.id, s.name
    ), events AS (
        INSERT INTO message_event (message_id, at, kind, detail)
        SELECT id, decided_at, 'check',
               CASE state WHEN 'CONFIRMED' THEN 'COMMITTED' ELSE 'ROLLED_BACK' END
          FROM decided
    )
    SELECT id, token, CASE state WHEN 'CONFIRMED' THEN topic END AS topic FROM decided";

/// A check that brought no verdict.
struct Later {
    id: MessageId,
    token: Uuid,
    /// Until the next one.
    wait: Duration,
    /// It was answered.
    counts: bool,
    unresolved: bool,
    answer: Option<&'static str>,
    /// What to say when it becomes unresolved now.
    flagged: Option<String>,
}

impl Later {
    fn unanswered(claim: &CheckClaim, wait: Duration) -> Self {
        Self {
            id: claim.id,
            token: claim.token,
            wait,
            counts: false,
            unresolved: false,
            answer: None,
            flagged: None,
        }
    }
}

async fn check_later(
    db: &mut Session,
    later: Vec<Later>,
) -> Result<Vec<(Uuid, Uuid)>, sqlx::Error> {
    if later.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<_> = later.iter().map(|later| uuid(later.id)).collect();
    let tokens: Vec<_> = later.iter().map(|later| later.token).collect();
    let waits: Vec<_> = later.iter().map(|later| span(later.wait)).collect();
    let counts: Vec<i64> = later.iter().map(|later| later.counts.into()).collect();
    let unresolved: Vec<_> = later.iter().map(|later| later.unresolved).collect();
    let answers: Vec<_> = later.iter().map(|later| later.answer).collect();
    let flagged: Vec<_> = later.iter().map(|later| later.flagged.as_deref()).collect();
    let rows = db
        .fetch(CHECK_LATER, |query| {
            query
                .bind(&ids)
                .bind(&tokens)
                .bind(&waits)
                .bind(&counts)
                .bind(&unresolved)
                .bind(&answers)
                .bind(&flagged)
        })
        .await?;
    rows.iter()
        .map(|row| Ok((get(row, "id")?, get(row, "token")?)))
        .collect()
}

const CHECK_LATER: &str = "-- check again later
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::interval[], $4::bigint[], $5::boolean[],
                             $6::text[], $7::text[])
            AS i(id, token, wait, counts, unresolved, answer, flagged)
    ), locked AS MATERIALIZED (
        SELECT i.* FROM input i JOIN message m ON m.id = ANY (ARRAY[i.id])
         WHERE (m.state = 'PREPARED' AND m.check_token = i.token) IS TRUE
         ORDER BY i.id FOR UPDATE OF m /* waits */
    ), written AS (
        UPDATE message m
           SET check_at = clock_timestamp() + l.wait, check_token = NULL,
               checks = m.checks + l.counts, unresolved = m.unresolved OR l.unresolved
          FROM locked l WHERE m.id = ANY (ARRAY[l.id])
        RETURNING m.id, l.token, l.answer, l.flagged
    ), events AS (
        INSERT INTO message_event (message_id, at, kind, detail)
        SELECT w.id, clock_timestamp(), e.kind, e.detail
          FROM written w, LATERAL (VALUES (1, 'check', w.answer), (2, 'unresolved', w.flagged))
               AS e(nth, kind, detail)
         WHERE e.detail IS NOT NULL
         ORDER BY w.id, e.nth
    )
    SELECT id, token FROM written";
