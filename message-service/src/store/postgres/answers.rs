//! What comes back about deliveries: answers, ended streams, sends that did not happen, silence.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use uuid::Uuid;

use super::lanes::{Replies, Work};
use super::outcomes::{Became, Happening, happen};
use super::rows::{get, id, long, maybe_at, moved_on, uuid};
use super::session::Session;
use super::time::{At, StoreClock, span};
use super::topology;
use crate::message::delivery::{DeliveryEvent, Outcome};
use crate::message::{Answer, AnswerKind, MessageId, Timestamp};
use crate::store::kind::Kind;
use crate::store::{AnswerOutcome, Overdue, OverdueDecision, Returned, Unsent};

/// The lane of answers.
pub(super) struct Acknowledge(pub(super) StdRng);

impl Work for Acknowledge {
    type Call = (String, Vec<Answer>);
    type Reply = Vec<AnswerOutcome>;

    fn kind(&self) -> Kind {
        Kind::Acknowledge
    }

    fn size((_, answers): &Self::Call) -> (usize, usize) {
        (answers.len(), 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Vec<AnswerOutcome>>, sqlx::Error> {
        let doing = Kind::Acknowledge.doing();
        let answers: Vec<(&str, &Answer)> = calls
            .iter()
            .flat_map(|(name, answers)| answers.iter().map(move |answer| (name.as_str(), answer)))
            .collect();
        let consumed = consume(db, first_consumed(&answers)).await?;
        let mut others = Vec::new();
        for (subscription, answer) in &answers {
            if !recorded(&consumed, subscription, answer) {
                others.push(Happening {
                    id: answer.id,
                    subscription,
                    event: DeliveryEvent::Answer(answer.generation, &answer.kind),
                    token: None,
                });
            }
        }
        let mut others = happen(db, &mut self.0, &others, doing).await?.into_iter();
        let mut outcomes = answers.iter().map(|(subscription, answer)| {
            if recorded(&consumed, subscription, answer) {
                return Ok(AnswerOutcome::Recorded);
            }
            others
                .next()
                .unwrap_or_else(|| Err(moved_on(doing)))
                .map(outcome)
        });
        Ok(calls
            .iter()
            .map(|(_, answers)| {
                // All outcomes of a call are taken, so that the next call finds its own.
                let mine: Vec<_> = outcomes.by_ref().take(answers.len()).collect();
                mine.into_iter().collect()
            })
            .collect())
    }
}

fn outcome(outcome: Option<Outcome>) -> AnswerOutcome {
    match outcome {
        None => AnswerOutcome::NoSuchDelivery,
        Some(Outcome::Stale) => AnswerOutcome::Stale,
        Some(
            Outcome::Again { .. }
            | Outcome::Consumed
            | Outcome::Dead { .. }
            | Outcome::Skipped
            | Outcome::AlreadySo,
        ) => AnswerOutcome::Recorded,
    }
}

type Consumed<'a> = HashSet<(Uuid, &'a str)>;

fn recorded(consumed: &Consumed<'_>, subscription: &str, answer: &Answer) -> bool {
    answer.kind == AnswerKind::Consumed && consumed.contains(&(uuid(answer.id), subscription))
}

/// The deliveries whose first word in this batch is CONSUMED: nearly all. They need no reading.
fn first_consumed<'a>(answers: &[(&'a str, &Answer)]) -> Vec<(Uuid, &'a str)> {
    let mut seen = HashSet::new();
    answers
        .iter()
        .filter(|(subscription, answer)| seen.insert((answer.id, *subscription)))
        .filter(|(_, answer)| answer.kind == AnswerKind::Consumed)
        .map(|(subscription, answer)| (uuid(answer.id), *subscription))
        .collect()
}

/// Moves deliveries to CONSUMED, wherever they are, and returns those that moved.
async fn consume<'a>(
    db: &mut Session,
    deliveries: Vec<(Uuid, &'a str)>,
) -> Result<Consumed<'a>, sqlx::Error> {
    if deliveries.is_empty() {
        return Ok(HashSet::new());
    }
    let (ids, subscriptions): (Vec<_>, Vec<_>) = deliveries.iter().copied().unzip();
    let rows = db
        .fetch(CONSUME, |query| query.bind(&ids).bind(&subscriptions))
        .await?;
    let names: HashMap<&str, &'a str> = subscriptions.iter().map(|name| (*name, *name)).collect();
    let mut consumed = HashSet::with_capacity(rows.len());
    for row in &rows {
        if let Some(name) = names.get(get::<&str>(row, "subscription")?) {
            consumed.insert((get(row, "message_id")?, *name));
        }
    }
    Ok(consumed)
}

pub(super) const CONSUME: &str = "-- consume
    WITH input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::text[]) AS i(id, subscription)
    ), locked AS MATERIALIZED (
        SELECT d.message_id, d.subscription
          FROM input i
          JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = i.subscription
         WHERE d.state IN ('PENDING', 'SENT', 'DEAD', 'SKIPPED')
         ORDER BY i.id, d.subscription FOR UPDATE OF d /* waits */
    )
    UPDATE delivery d
       SET state = 'CONSUMED', due_at = NULL, token = NULL,
           answered_at = clock_timestamp()
      FROM locked l
     WHERE d.message_id = ANY (ARRAY[l.message_id]) AND d.subscription = l.subscription
    RETURNING d.message_id, d.subscription";

/// What the broker does not have, or has given back.
pub(super) enum Back {
    /// Sends that did not happen.
    Unsent(String, Vec<Unsent>),
    /// What an ended stream held, and whether that may be the deliveries' fault.
    Ended(String, Vec<Returned>, bool),
}

/// The lane of returns.
pub(super) struct TakeBack(pub(super) StdRng);

impl Work for TakeBack {
    type Call = Back;
    type Reply = usize;

    fn kind(&self) -> Kind {
        Kind::Return
    }

    fn size(call: &Back) -> (usize, usize) {
        match call {
            Back::Unsent(_, unsent) => (unsent.len(), 0),
            Back::Ended(_, returned, _) => (returned.len(), 0),
        }
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Back],
    ) -> Result<Replies<usize>, sqlx::Error> {
        let happenings: Vec<Vec<Happening<'_>>> = calls.iter().map(back).collect();
        changes(db, &mut self.0, happenings, Kind::Return).await
    }
}

fn back(call: &Back) -> Vec<Happening<'_>> {
    match call {
        Back::Unsent(subscription, unsent) => unsent
            .iter()
            .map(|unsent| Happening {
                id: unsent.id,
                subscription,
                event: unsent.why.event(),
                token: Some(unsent.token),
            })
            .collect(),
        Back::Ended(subscription, returned, counts) => returned
            .iter()
            .map(|returned| Happening {
                id: returned.id,
                subscription,
                event: DeliveryEvent::StreamEnded {
                    generation: returned.generation,
                    counts: *counts,
                },
                token: None,
            })
            .collect(),
    }
}

/// Lets all of it happen together and tells each call how many of its deliveries changed.
async fn changes(
    db: &mut Session,
    rng: &mut StdRng,
    calls: Vec<Vec<Happening<'_>>>,
    kind: Kind,
) -> Result<Replies<usize>, sqlx::Error> {
    let lengths: Vec<_> = calls.iter().map(Vec::len).collect();
    let happenings: Vec<_> = calls.into_iter().flatten().collect();
    let mut became = happen(db, rng, &happenings, kind.doing())
        .await?
        .into_iter();
    Ok(lengths
        .into_iter()
        .map(|length| {
            let mine: Vec<Became> = became.by_ref().take(length).collect();
            let mut changed = 0;
            for became in mine {
                changed += usize::from(is_change(became?.as_ref()));
            }
            Ok(changed)
        })
        .collect())
}

fn is_change(outcome: Option<&Outcome>) -> bool {
    match outcome {
        Some(Outcome::Again { .. } | Outcome::Dead { .. }) => true,
        None | Some(Outcome::Consumed | Outcome::Skipped | Outcome::AlreadySo | Outcome::Stale) => {
            false
        }
    }
}

/// What the recovery pass wants.
pub(super) enum Recovery {
    /// To write its decisions.
    Settle(String, Vec<(Overdue, OverdueDecision)>),
    /// To end what is older than its subscription's `max_age`.
    Expire(String, usize),
}

/// The lane of the recovery pass.
pub(super) struct Recover {
    rng: StdRng,
    clock: Arc<StoreClock>,
    /// Before when nothing of a subscription can be too old: its oldest open delivery is not.
    /// There is no index for it, so it is looked up only when it may be time.
    nothing_before: HashMap<String, (Timestamp, Duration)>,
}

impl Recover {
    pub(super) fn new(rng: StdRng, clock: Arc<StoreClock>) -> Self {
        Self {
            rng,
            clock,
            nothing_before: HashMap::new(),
        }
    }
}

impl Work for Recover {
    type Call = Recovery;
    type Reply = usize;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Recover
    }

    fn size(call: &Recovery) -> (usize, usize) {
        match call {
            Recovery::Settle(_, decisions) => (decisions.len(), 0),
            Recovery::Expire(_, limit) => (*limit, 0),
        }
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Recovery],
    ) -> Result<Replies<usize>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            replies.push(match call {
                Recovery::Settle(subscription, decisions) => {
                    self.settle(db, subscription, decisions).await?
                }
                Recovery::Expire(subscription, limit) => {
                    self.expire(db, subscription, *limit).await?
                }
            });
        }
        Ok(replies)
    }
}

impl Recover {
    async fn settle(
        &mut self,
        db: &mut Session,
        subscription: &str,
        decisions: &[(Overdue, OverdueDecision)],
    ) -> Result<Result<usize, crate::store::Error>, sqlx::Error> {
        let (mut passed, mut waiting) = (Vec::new(), Vec::new());
        for (overdue, decision) in decisions {
            match decision {
                OverdueDecision::PassedBy => passed.push(Happening {
                    id: overdue.id,
                    subscription,
                    event: DeliveryEvent::PassedBy(overdue.generation),
                    token: None,
                }),
                OverdueDecision::Wait(wait) => waiting.push((overdue, *wait)),
            }
        }
        let waited = look_again(db, subscription, &waiting).await?;
        let changed = changes(db, &mut self.rng, vec![passed], Kind::Recover)
            .await?
            .pop()
            .unwrap_or(Ok(0));
        Ok(changed.map(|changed| changed + waited))
    }

    async fn expire(
        &mut self,
        db: &mut Session,
        subscription: &str,
        limit: usize,
    ) -> Result<Result<usize, crate::store::Error>, sqlx::Error> {
        let Some(max_age) = topology::policy(db, subscription).await?.max_age else {
            return Ok(Ok(0));
        };
        if let Some((until, for_max_age)) = self.nothing_before.get(subscription)
            && *for_max_age == max_age
            && self.clock.now() < *until
        {
            return Ok(Ok(0));
        }
        // Whatever comes of it, it is not asked again at once: with much open it takes long.
        let until = (self.clock.now().after(LOOK_AT_LEAST_EVERY), max_age);
        self.nothing_before.insert(subscription.to_owned(), until);
        let (ids, oldest_in) = too_old(db, subscription, max_age, limit).await?;
        if ids.is_empty() {
            // Without an open delivery, the next one is too old `max_age` from now at the soonest.
            let wait = oldest_in.unwrap_or(max_age).min(LOOK_AT_LEAST_EVERY);
            let until = (self.clock.now().after(wait), max_age);
            self.nothing_before.insert(subscription.to_owned(), until);
            return Ok(Ok(0));
        }
        self.nothing_before.remove(subscription);
        let happenings = ids
            .into_iter()
            .map(|id| Happening {
                id,
                subscription,
                event: DeliveryEvent::TooOld,
                token: None,
            })
            .collect();
        Ok(changes(db, &mut self.rng, vec![happenings], Kind::Recover)
            .await?
            .pop()
            .unwrap_or(Ok(0)))
    }
}

/// How long nothing is looked up at most, in case the clock is set back.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// Deliveries of each kind that are looked at. There is no index on the time of the confirm. Of
/// what waits, the oldest due were confirmed first, unless they failed before; those are looked at
/// when they are due, or SENT.
const LOOKED_AT: u32 = 20_000;

/// The oldest deliveries that are too old, or else how long until the oldest is.
async fn too_old(
    db: &mut Session,
    subscription: &str,
    max_age: Duration,
    limit: usize,
) -> Result<(Vec<MessageId>, Option<Duration>), sqlx::Error> {
    let waits = "SELECT message_id, confirmed_at FROM delivery
                  WHERE subscription = $1 AND state = 'PENDING'";
    let first = format!("ORDER BY due_at LIMIT {LOOKED_AT}");
    let rows = db
        .fetch(
            &format!(
                "-- too old
                 WITH t AS MATERIALIZED (SELECT clock_timestamp() - $2 AS cutoff)
                 SELECT d.message_id, d.confirmed_at, t.cutoff FROM t, (
                     ({waits} AND stream_ends = 0 AND (token IS NOT NULL)::int = 0 {first})
                     UNION ALL
                     ({waits} AND stream_ends = 0 AND (token IS NOT NULL)::int = 1 {first})
                     UNION ALL
                     ({waits} AND stream_ends > 0 AND (token IS NOT NULL)::int = 0 {first})
                     UNION ALL
                     ({waits} AND stream_ends > 0 AND (token IS NOT NULL)::int = 1 {first})
                     UNION ALL
                     (SELECT message_id, confirmed_at FROM delivery
                       WHERE subscription = $1 AND state = 'SENT' {first})
                 ) AS d ORDER BY d.confirmed_at LIMIT $3"
            ),
            |query| {
                query
                    .bind(subscription)
                    .bind(span(max_age))
                    .bind(long(limit))
            },
        )
        .await?;
    let mut ids = Vec::new();
    let mut oldest_in = None;
    for row in &rows {
        let (confirmed, cutoff) = (maybe_at(row, "confirmed_at")?, maybe_at(row, "cutoff")?);
        if confirmed < cutoff {
            ids.push(id(row, "message_id")?);
        } else if let (None, Some(confirmed), Some(cutoff)) = (oldest_in, confirmed, cutoff) {
            oldest_in = Some(confirmed.since(cutoff));
        }
    }
    Ok((ids, oldest_in))
}

/// Lets silence be looked at again later.
async fn look_again(
    db: &mut Session,
    subscription: &str,
    waiting: &[(&Overdue, Duration)],
) -> Result<usize, sqlx::Error> {
    if waiting.is_empty() {
        return Ok(0);
    }
    let ids: Vec<_> = waiting
        .iter()
        .map(|(overdue, _)| uuid(overdue.id))
        .collect();
    let generations: Vec<i64> = waiting
        .iter()
        .map(|(overdue, _)| overdue.generation.into())
        .collect();
    let due_at: Vec<_> = waiting
        .iter()
        .map(|(overdue, _)| At(overdue.due_at))
        .collect();
    let waits: Vec<_> = waiting.iter().map(|(_, wait)| span(*wait)).collect();
    let rows = db
        .fetch(
            "-- look again later
             WITH input AS MATERIALIZED (
                 SELECT * FROM unnest($2::uuid[], $3::bigint[], $4::timestamptz[], $5::interval[])
                     AS i(id, generation, due_at, wait)
             ), locked AS MATERIALIZED (
                 SELECT d.message_id, i.wait
                   FROM input i
                   JOIN delivery d ON d.message_id = ANY (ARRAY[i.id]) AND d.subscription = $1
                  WHERE d.state = 'SENT' AND d.generation = i.generation AND d.due_at = i.due_at
                  ORDER BY i.id FOR UPDATE OF d /* waits */
             )
             UPDATE delivery d SET due_at = clock_timestamp() + l.wait
               FROM locked l WHERE d.message_id = ANY (ARRAY[l.message_id]) AND d.subscription = $1
             RETURNING d.message_id",
            |query| {
                query
                    .bind(subscription)
                    .bind(&ids)
                    .bind(&generations)
                    .bind(&due_at)
                    .bind(&waits)
            },
        )
        .await?;
    Ok(rows.len())
}
