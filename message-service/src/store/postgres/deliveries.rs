//! Deliveries on their way out: claims, SENT, renewed leases, and what is overdue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::bodies;
use super::lanes::{Replies, Work};
use super::marks::{ALWAYS, Marks};
use super::rows::{at, count, get, id, long, maybe_at, uuid};
use super::session::Session;
use super::time::{At, span};
use crate::message::Timestamp;
use crate::store::kind::Kind;
use crate::store::{Claimed, DeliveryClaim, FRESH_FOR, LOOK_AHEAD, Lane as Claims, Overdue, Sent};

/// The lane of claims.
pub(super) struct Claim {
    rng: StdRng,
    marks: Arc<Marks>,
}

impl Claim {
    pub(super) fn new(rng: StdRng, marks: Arc<Marks>) -> Self {
        Self { rng, marks }
    }
}

impl Work for Claim {
    type Call = (String, Claims, Duration);
    type Reply = Claimed;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Claim
    }

    fn size((_, lane, _): &Self::Call) -> (usize, usize) {
        let rows = match lane {
            Claims::Normal { limit, .. } | Claims::Fresh { limit, .. } => *limit,
            Claims::Alone => 1,
        };
        (rows, 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Claimed>, sqlx::Error> {
        let mut claims = Vec::with_capacity(calls.len());
        for (subscription, lane, lease) in calls {
            claims.push(Ok(self.claim(db, subscription, *lane, *lease).await?));
        }
        Ok(claims)
    }
}

impl Claim {
    async fn claim(
        &mut self,
        db: &mut Session,
        subscription: &str,
        lane: Claims,
        lease: Duration,
    ) -> Result<Claimed, sqlx::Error> {
        let from = self.marks.claim_from(subscription);
        let floor = from.floor;
        let (which, limit, max_bytes, floor) = match lane {
            Claims::Normal { limit, max_bytes } => (Which::Normal, limit, max_bytes, floor),
            Claims::Fresh { limit, max_bytes } => (Which::Fresh, limit, max_bytes, floor),
            Claims::Alone => (Which::Alone, 1, usize::MAX, ALWAYS),
        };
        // One token serves the whole claim: a lease is lost row by row, but taken together.
        let token = uuid::Builder::from_random_bytes(self.rng.random()).into_uuid();
        let sql = claim_sql(which);
        let rows = db
            .fetch(&sql, |query| {
                query
                    .bind(subscription)
                    .bind(long(limit))
                    .bind(span(lease))
                    .bind(long(max_bytes))
                    .bind(At(floor))
                    .bind(token)
            })
            .await?;
        let wanted = rows
            .iter()
            .map(|row| Ok((id(row, "message_id")?, get(row, "bucket")?)))
            .collect::<Result<Vec<_>, sqlx::Error>>()?;
        let mut bodies = bodies::read(db, wanted).await?;
        let mut deliveries = Vec::with_capacity(rows.len());
        for row in &rows {
            let id = id(row, "message_id")?;
            // A row without its body was reported; its neighbours are sent all the same.
            let Some(body) = bodies.remove(&id) else {
                continue;
            };
            deliveries.push(DeliveryClaim {
                id,
                generation: count(row, "generation")?,
                token,
                producer: get(row, "producer")?,
                topic: get(row, "topic")?,
                key: get(row, "key")?,
                content_type: body.content_type,
                headers: body.headers,
                payload: body.payload,
                sent_at: at(row, "sent_at")?,
                first_sent_at: at(row, "first_sent_at")?,
            });
        }
        let next = next_due(db, subscription, floor).await?;
        if which == Which::Normal {
            let oldest = [next.free, next.leased].into_iter().flatten().min();
            self.marks.mark(subscription, from, next.now, oldest);
        }
        let nearest = match which {
            Which::Normal | Which::Fresh => [next.free, next.leased],
            Which::Alone => [next.alone, None],
        };
        let nearest = nearest.into_iter().flatten().min();
        Ok(Claimed {
            deliveries,
            alone_waits: next.alone.is_some_and(|due| due <= next.now),
            next_due_in: nearest.map(|due| due.since(next.now)),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Normal,
    Fresh,
    Alone,
}

/// The statement of a claim. It walks along what is free and due, then along leases that ran out,
/// and along those that end later than any lease can, which a clock that was set back has left.
/// Rows that somebody else is claiming are passed over. Only narrow rows come back: bodies are
/// read when the locks are gone.
pub(super) fn claim_sql(which: Which) -> String {
    let ends = match which {
        Which::Normal | Which::Fresh => "d.stream_ends = 0",
        Which::Alone => "d.stream_ends > 0",
    };
    // What was confirmed lately cannot have been due before that.
    let fresh = match which {
        Which::Fresh => {
            let micros = FRESH_FOR.as_micros();
            format!(
                "AND d.due_at > (SELECT now FROM t) - interval '{micros} microseconds'
                 AND d.confirmed_at > (SELECT now FROM t) - interval '{micros} microseconds'"
            )
        }
        Which::Normal | Which::Alone => String::new(),
    };
    let part = |leased: u8, due: &str| {
        format!(
            "SELECT d.message_id, d.due_at FROM delivery d
              WHERE d.subscription = $1 AND d.state = 'PENDING' AND {ends}
                AND (d.token IS NOT NULL)::int = {leased} AND {due} {fresh}
              ORDER BY d.due_at LIMIT $2 FOR UPDATE OF d SKIP LOCKED"
        )
    };
    let due = "d.due_at >= $5 AND d.due_at <= (SELECT now FROM t)";
    let (free, expired) = (part(0, due), part(1, due));
    let far = part(1, "d.due_at > (SELECT now FROM t) + 2 * $3");
    format!(
        "-- claim deliveries: {which:?}
         WITH t AS MATERIALIZED (
             SELECT clock_timestamp() AS now
         ), free AS MATERIALIZED (
             {free}
         ), expired AS MATERIALIZED (
             {expired}
         ), far AS MATERIALIZED (
             {far}
         ), due AS MATERIALIZED (
             SELECT u.message_id, u.due_at, m.producer, m.topic, m.key, m.bucket, m.body_bytes
               FROM (SELECT * FROM free UNION ALL SELECT * FROM expired
                     UNION ALL SELECT * FROM far) u
               JOIN message m ON m.id = ANY (ARRAY[u.message_id])
              ORDER BY u.due_at, u.message_id LIMIT $2
         ), taken AS MATERIALIZED (
             SELECT * FROM (SELECT due.*, row_number() OVER nearest AS nth,
                                   sum(body_bytes) OVER nearest AS bytes
                              FROM due
                            WINDOW nearest AS (ORDER BY due_at, message_id
                                               ROWS UNBOUNDED PRECEDING)) AS summed
              WHERE nth = 1 OR bytes <= $4
         ), leased AS (
             UPDATE delivery d
                SET due_at = clock_timestamp() + $3, token = $6, generation = d.generation + 1,
                    sent_at = (SELECT now FROM t),
                    first_sent_at = coalesce(d.first_sent_at, (SELECT now FROM t))
               FROM taken k
              WHERE d.message_id = ANY (ARRAY[k.message_id]) AND d.subscription = $1
             RETURNING d.message_id, d.generation, d.sent_at, d.first_sent_at, k.producer,
                       k.topic, k.key, k.bucket, k.nth
         )
         SELECT * FROM leased ORDER BY nth"
    )
}

/// When the next deliveries are due, as far as [`LOOK_AHEAD`].
struct NextDue {
    now: Timestamp,
    free: Option<Timestamp>,
    leased: Option<Timestamp>,
    alone: Option<Timestamp>,
}

async fn next_due(
    db: &mut Session,
    subscription: &str,
    floor: Timestamp,
) -> Result<NextDue, sqlx::Error> {
    let rows = db
        .fetch(NEXT_DUE, |query| {
            query
                .bind(subscription)
                .bind(At(floor))
                .bind(span(LOOK_AHEAD))
        })
        .await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    Ok(NextDue {
        now: at(row, "now")?,
        free: maybe_at(row, "free")?,
        leased: maybe_at(row, "leased")?,
        alone: maybe_at(row, "alone")?,
    })
}

/// Not further than is asked for: what was leased and is done fills the index up to the end of its
/// leases.
pub(super) const NEXT_DUE: &str = "-- next due
    WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
    SELECT t.now,
           (SELECT due_at FROM delivery WHERE subscription = $1 AND state = 'PENDING'
               AND stream_ends = 0 AND (token IS NOT NULL)::int = 0
               AND due_at >= $2 AND due_at <= t.now + $3 ORDER BY due_at LIMIT 1) AS free,
           (SELECT due_at FROM delivery WHERE subscription = $1 AND state = 'PENDING'
               AND stream_ends = 0 AND (token IS NOT NULL)::int = 1
               AND due_at >= $2 AND due_at <= t.now + $3 ORDER BY due_at LIMIT 1) AS leased,
           least(
           (SELECT due_at FROM delivery WHERE subscription = $1 AND state = 'PENDING'
               AND stream_ends > 0 AND (token IS NOT NULL)::int = 0
               AND due_at <= t.now + $3 ORDER BY due_at LIMIT 1),
           (SELECT due_at FROM delivery WHERE subscription = $1 AND state = 'PENDING'
               AND stream_ends > 0 AND (token IS NOT NULL)::int = 1
               AND due_at <= t.now + $3 ORDER BY due_at LIMIT 1)
           ) AS alone
      FROM t";

/// What is known about sends that hold their lease.
pub(super) enum Leased {
    /// They happened.
    Mark(String, Vec<Sent>, Duration),
    /// They are still under way.
    Renew(String, Vec<Sent>, Duration),
}

impl Leased {
    fn parts(&self) -> (&str, &[Sent], Duration) {
        match self {
            Self::Mark(subscription, sent, wait) | Self::Renew(subscription, sent, wait) => {
                (subscription, sent, *wait)
            }
        }
    }
}

/// The lane of SENT.
pub(super) struct MarkSent;

impl Work for MarkSent {
    type Call = Leased;
    type Reply = usize;

    fn kind(&self) -> Kind {
        Kind::Sent
    }

    fn size(call: &Leased) -> (usize, usize) {
        (call.parts().1.len(), 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Leased],
    ) -> Result<Replies<usize>, sqlx::Error> {
        let is_mark = |call: &Leased| matches!(call, Leased::Mark(..));
        let mut changed = vec![0; calls.len()];
        for (sql, marks) in [(MARK_SENT, true), (RENEW, false)] {
            let which = calls
                .iter()
                .enumerate()
                .filter(|(_, call)| is_mark(call) == marks);
            still_leased(db, sql, which, &mut changed).await?;
        }
        Ok(changed.into_iter().map(Ok).collect())
    }
}

async fn still_leased(
    db: &mut Session,
    sql: &'static str,
    calls: impl Iterator<Item = (usize, &Leased)>,
    changed: &mut [usize],
) -> Result<(), sqlx::Error> {
    let (mut ids, mut subscriptions, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let (mut waits, mut owner) = (Vec::new(), HashMap::new());
    for (call, leased) in calls {
        let (subscription, sent, wait) = leased.parts();
        for Sent { id, token } in sent {
            // The same send twice is told once.
            if owner.insert((uuid(*id), subscription), call).is_none() {
                ids.push(uuid(*id));
                subscriptions.push(subscription);
                tokens.push(*token);
                waits.push(span(wait));
            }
        }
    }
    if ids.is_empty() {
        return Ok(());
    }
    let rows = db
        .fetch(sql, |query| {
            query
                .bind(&ids)
                .bind(&subscriptions)
                .bind(&tokens)
                .bind(&waits)
        })
        .await?;
    for row in &rows {
        let key = (get::<Uuid>(row, "message_id")?, get(row, "subscription")?);
        if let Some(call) = owner.get(&key) {
            changed[*call] += 1;
        }
    }
    Ok(())
}

pub(super) const MARK_SENT: &str = "-- mark sent
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::interval[])
            AS i(id, subscription, token, wait)
    ), locked AS MATERIALIZED (
        SELECT d.message_id, d.subscription, i.wait
          FROM input i JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = i.subscription
         WHERE (d.state = 'PENDING' AND d.token = i.token) IS TRUE
         ORDER BY i.id, d.subscription FOR UPDATE OF d /* waits */
    )
    UPDATE delivery d SET state = 'SENT', due_at = clock_timestamp() + l.wait, token = NULL
      FROM locked l
     WHERE d.message_id = ANY (ARRAY[l.message_id]) AND d.subscription = l.subscription
    RETURNING d.message_id, d.subscription";

const RENEW: &str = "-- renew leases
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::interval[])
            AS i(id, subscription, token, wait)
    ), locked AS MATERIALIZED (
        SELECT d.message_id, d.subscription, i.wait
          FROM input i JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = i.subscription
         WHERE (d.state = 'PENDING' AND d.token = i.token) IS TRUE
         ORDER BY i.id, d.subscription FOR UPDATE OF d /* waits */
    )
    UPDATE delivery d SET due_at = clock_timestamp() + l.wait
      FROM locked l
     WHERE d.message_id = ANY (ARRAY[l.message_id]) AND d.subscription = l.subscription
    RETURNING d.message_id, d.subscription";

/// Deliveries that are SENT and whose answer is overdue, oldest first.
pub(super) async fn overdue(
    db: &mut Session,
    subscription: &str,
    limit: usize,
) -> Result<Vec<Overdue>, sqlx::Error> {
    let rows = db
        .fetch(
            "-- overdue deliveries
             SELECT message_id, generation, sent_at, due_at FROM delivery
              WHERE subscription = $1 AND state = 'SENT'
                AND due_at <= (SELECT clock_timestamp())
              ORDER BY due_at LIMIT $2",
            |query| query.bind(subscription).bind(long(limit)),
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Overdue {
                id: id(row, "message_id")?,
                generation: count(row, "generation")?,
                sent_at: at(row, "sent_at")?,
                due_at: at(row, "due_at")?,
            })
        })
        .collect()
}
