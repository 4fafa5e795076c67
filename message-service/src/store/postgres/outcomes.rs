//! What is rare in the life of a delivery, decided by the pure code and written if nothing
//! changed meanwhile.
//!
//! The rows are read, [`Delivery::apply`] decides, and one statement writes all outcomes whose
//! rows are still as they were read. Those that moved on are read and decided again.

use std::collections::HashMap;

use rand::Rng as _;
use rand::rngs::StdRng;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::rows::{at, clean, count, delivery_state, get, id, maybe_at, moved_on, uuid};
use super::session::Session;
use super::time::At;
use super::topology;
use crate::message::delivery::{DeliveryEvent, Outcome};
use crate::message::policy::Chance;
use crate::message::{Delivery, DeliveryPolicy, DeliveryState, MessageId, Timestamp};
use crate::store::{Error, timeline};

/// How often rows are read again that were not as they had just been read.
const ROUNDS: u32 = 5;

/// Something that happens to one delivery.
pub(super) struct Happening<'a> {
    pub(super) id: MessageId,
    pub(super) subscription: &'a str,
    pub(super) event: DeliveryEvent<'a>,
    /// It concerns only the send that holds this lease.
    pub(super) token: Option<Uuid>,
}

/// What became of it: `None` if there is no such delivery.
pub(super) type Became = Result<Option<Outcome>, Error>;

/// A row as it was read.
#[derive(Clone)]
struct Seen {
    delivery: Delivery,
    token: Option<Uuid>,
}

/// Lets events happen, in order for each delivery, and writes what becomes of them. A delivery in
/// a state that this version does not know is left alone.
pub(super) async fn happen(
    db: &mut Session,
    rng: &mut StdRng,
    happenings: &[Happening<'_>],
    doing: &'static str,
) -> Result<Vec<Became>, sqlx::Error> {
    let mut became: Vec<Option<Became>> = happenings.iter().map(|_| None).collect();
    let policies = policies(db, happenings).await?;
    let mut idle = 0;
    loop {
        let open: Vec<usize> = (0..happenings.len())
            .filter(|index| became[*index].is_none())
            .collect();
        if open.is_empty() || idle >= ROUNDS {
            break;
        }
        round(db, rng, happenings, &policies, &open, &mut became).await?;
        let left = became.iter().filter(|became| became.is_none()).count();
        idle = if left < open.len() { 0 } else { idle + 1 };
    }
    Ok(became
        .into_iter()
        .map(|became| became.unwrap_or_else(|| Err(moved_on(doing))))
        .collect())
}

async fn policies<'a>(
    db: &mut Session,
    happenings: &[Happening<'a>],
) -> Result<HashMap<&'a str, DeliveryPolicy>, sqlx::Error> {
    let mut policies = HashMap::new();
    for happening in happenings {
        let name = happening.subscription;
        if !policies.contains_key(name) {
            policies.insert(name, topology::policy(db, name).await?);
        }
    }
    Ok(policies)
}

/// Reads, decides and writes once. Of several events of one delivery the first that changes
/// something is written; the others go round again unless they change nothing either way.
async fn round<'a>(
    db: &mut Session,
    rng: &mut StdRng,
    happenings: &[Happening<'a>],
    policies: &HashMap<&'a str, DeliveryPolicy>,
    open: &[usize],
    became: &mut [Option<Became>],
) -> Result<(), sqlx::Error> {
    let (now, rows) = read(db, open.iter().map(|index| &happenings[*index])).await?;
    let mut writes: HashMap<(MessageId, &str), Write<'_>> = HashMap::new();
    for index in open {
        let happening = &happenings[*index];
        let key = (happening.id, happening.subscription);
        if writes.contains_key(&key) {
            continue;
        }
        let Some(seen) = rows.get(&(happening.id, happening.subscription.to_owned())) else {
            became[*index] = Some(Ok(None));
            continue;
        };
        let Some(seen) = seen else {
            became[*index] = Some(Ok(Some(Outcome::Stale)));
            continue;
        };
        if happening.token.is_some() && seen.token != happening.token {
            became[*index] = Some(Ok(Some(Outcome::Stale)));
            continue;
        }
        let policy = &policies[happening.subscription];
        let chance = Chance::new(rng.random_range(-1.0..=1.0));
        match seen.delivery.apply(&happening.event, policy, now, chance) {
            unchanged @ (Outcome::AlreadySo | Outcome::Stale) => {
                became[*index] = Some(Ok(Some(unchanged)));
            }
            outcome => {
                let write = Write {
                    index: *index,
                    seen,
                    outcome,
                };
                writes.insert(key, write);
            }
        }
    }
    let written = write(db, happenings, &writes).await?;
    for ((id, subscription), write) in writes {
        if written.contains(&(id, subscription.to_owned())) {
            became[write.index] = Some(Ok(Some(write.outcome)));
        }
    }
    Ok(())
}

/// An outcome to be written over the row that it was decided from.
struct Write<'a> {
    index: usize,
    seen: &'a Seen,
    outcome: Outcome,
}

type Rows = HashMap<(MessageId, String), Option<Seen>>;

/// The database's time and the deliveries; `None` for one in an unknown state.
async fn read<'a>(
    db: &mut Session,
    wanted: impl Iterator<Item = &'a Happening<'a>>,
) -> Result<(Timestamp, Rows), sqlx::Error> {
    let (ids, subscriptions): (Vec<_>, Vec<_>) = wanted
        .map(|happening| (uuid(happening.id), happening.subscription))
        .unzip();
    let rows = db
        .fetch(
            "-- read deliveries
             SELECT d.message_id, d.subscription, d.state, d.token, d.attempts, d.generation,
                    d.answered_generation, d.laters, d.stream_ends, d.confirmed_at, d.sent_at,
                    clock_timestamp() AS now
               FROM unnest($1::uuid[], $2::text[]) AS i(id, subscription)
               JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = i.subscription",
            |query| query.bind(&ids).bind(&subscriptions),
        )
        .await?;
    let mut now = Timestamp::default();
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        now = now.max(at(row, "now")?);
        let key = (id(row, "message_id")?, get(row, "subscription")?);
        found.insert(key, seen(row)?);
    }
    Ok((now, found))
}

fn seen(row: &PgRow) -> Result<Option<Seen>, sqlx::Error> {
    let Some(state) = delivery_state(row)? else {
        return Ok(None);
    };
    let delivery = Delivery {
        state,
        attempts: count(row, "attempts")?,
        generation: count(row, "generation")?,
        answered_generation: count(row, "answered_generation")?,
        laters: count(row, "laters")?,
        stream_ends: count(row, "stream_ends")?,
        confirmed_at: at(row, "confirmed_at")?,
        sent_at: maybe_at(row, "sent_at")?,
    };
    let token = get(row, "token")?;
    Ok(Some(Seen { delivery, token }))
}

/// Outcomes as columns.
#[derive(Default)]
struct Columns<'a> {
    ids: Vec<Uuid>,
    subscriptions: Vec<&'a str>,
    seen_states: Vec<&'static str>,
    seen_tokens: Vec<Option<Uuid>>,
    seen_generations: Vec<i64>,
    seen_answered: Vec<i64>,
    seen_ends: Vec<i64>,
    states: Vec<&'static str>,
    due_at: Vec<Option<At>>,
    attempts: Vec<i64>,
    laters: Vec<i64>,
    stream_ends: Vec<i64>,
    errors: Vec<Option<String>>,
    event_ids: Vec<Uuid>,
    event_subscriptions: Vec<&'a str>,
    event_kinds: Vec<&'static str>,
    event_details: Vec<String>,
}

impl<'a> Columns<'a> {
    fn add(&mut self, happening: &Happening<'a>, seen: &Seen, outcome: &Outcome) {
        let was = &seen.delivery;
        let (state, due_at, attempts, laters, stream_ends, error) = match outcome {
            Outcome::Again {
                due_at,
                attempts,
                laters,
                stream_ends,
                error,
            } => {
                let state = DeliveryState::Pending;
                (
                    state,
                    Some(At(*due_at)),
                    *attempts,
                    *laters,
                    *stream_ends,
                    error.clone(),
                )
            }
            Outcome::Dead { attempts, error } => {
                let (state, error) = (DeliveryState::Dead, Some(error.clone()));
                (state, None, *attempts, was.laters, was.stream_ends, error)
            }
            Outcome::Consumed => ended(DeliveryState::Consumed, was),
            Outcome::Skipped => ended(DeliveryState::Skipped, was),
            // They are not written.
            Outcome::AlreadySo | Outcome::Stale => return,
        };
        self.ids.push(uuid(happening.id));
        self.subscriptions.push(happening.subscription);
        self.seen_states.push(was.state.as_str());
        self.seen_tokens.push(seen.token);
        self.seen_generations.push(was.generation.into());
        self.seen_answered.push(was.answered_generation.into());
        self.seen_ends.push(was.stream_ends.into());
        self.states.push(state.as_str());
        self.due_at.push(due_at);
        self.attempts.push(attempts.into());
        self.laters.push(laters.into());
        self.stream_ends.push(stream_ends.into());
        self.errors.push(error.as_deref().map(clean));
        for (kind, detail) in timeline::lines(&happening.event, outcome) {
            self.event_ids.push(uuid(happening.id));
            self.event_subscriptions.push(happening.subscription);
            self.event_kinds.push(kind);
            self.event_details.push(clean(&detail));
        }
    }
}

type Ended = (DeliveryState, Option<At>, u32, u32, u32, Option<String>);

fn ended(state: DeliveryState, was: &Delivery) -> Ended {
    (state, None, was.attempts, was.laters, was.stream_ends, None)
}

/// Writes outcomes with their events and returns which rows were still as they had been read.
async fn write<'a>(
    db: &mut Session,
    happenings: &[Happening<'a>],
    writes: &HashMap<(MessageId, &str), Write<'_>>,
) -> Result<Vec<(MessageId, String)>, sqlx::Error> {
    if writes.is_empty() {
        return Ok(Vec::new());
    }
    let mut columns = Columns::default();
    for write in writes.values() {
        columns.add(&happenings[write.index], write.seen, &write.outcome);
    }
    let rows = db
        .fetch(WRITE, |query| {
            query
                .bind(&columns.ids)
                .bind(&columns.subscriptions)
                .bind(&columns.seen_states)
                .bind(&columns.seen_tokens)
                .bind(&columns.seen_generations)
                .bind(&columns.seen_answered)
                .bind(&columns.seen_ends)
                .bind(&columns.states)
                .bind(&columns.due_at)
                .bind(&columns.attempts)
                .bind(&columns.laters)
                .bind(&columns.stream_ends)
                .bind(&columns.errors)
                .bind(&columns.event_ids)
                .bind(&columns.event_subscriptions)
                .bind(&columns.event_kinds)
                .bind(&columns.event_details)
        })
        .await?;
    rows.iter()
        .map(|row| Ok((id(row, "message_id")?, get(row, "subscription")?)))
        .collect()
}

/// A delivery that goes on has its answer of this generation counted; one that ends keeps what
/// it had.
pub(super) const WRITE: &str = "-- write outcomes
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::bigint[],
                             $6::bigint[], $7::bigint[], $8::text[], $9::timestamptz[],
                             $10::bigint[], $11::bigint[], $12::bigint[], $13::text[])
            AS i(id, subscription, seen_state, seen_token, seen_generation, seen_answered,
                 seen_ends, state, due_at, attempts, laters, stream_ends, error)
    ), locked AS MATERIALIZED (
        SELECT i.* FROM input i
          JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = i.subscription
         WHERE d.state = i.seen_state AND d.token IS NOT DISTINCT FROM i.seen_token
           AND d.generation = i.seen_generation AND d.answered_generation = i.seen_answered
           AND d.stream_ends = i.seen_ends
         ORDER BY i.id, d.subscription FOR UPDATE OF d /* waits */
    ), written AS (
        UPDATE delivery d
           SET state = l.state, due_at = l.due_at, token = NULL, attempts = l.attempts,
               laters = l.laters, stream_ends = l.stream_ends,
               last_error = coalesce(l.error, d.last_error),
               answered_generation = CASE WHEN l.state = 'PENDING' THEN d.generation
                                          ELSE d.answered_generation END,
               answered_at = CASE WHEN l.state = 'PENDING' THEN NULL ELSE clock_timestamp() END
          FROM locked l
         WHERE d.message_id = ANY (ARRAY[l.id]) AND d.subscription = l.subscription
        RETURNING d.message_id, d.subscription
    ), events AS (
        INSERT INTO message_event (message_id, subscription, at, kind, detail)
        SELECT e.id, e.subscription, clock_timestamp(), e.kind, e.detail
          FROM unnest($14::uuid[], $15::text[], $16::text[], $17::text[]) WITH ORDINALITY
               AS e(id, subscription, kind, detail, nth)
         WHERE ((e.id, e.subscription) IN (SELECT message_id, subscription FROM written)) IS TRUE
         ORDER BY e.nth
    )
    SELECT message_id, subscription FROM written";
