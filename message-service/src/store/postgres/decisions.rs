//! The producer's decisions: confirm, cancel, and publishing what was prepared.

use std::collections::{HashMap, HashSet};

use rand::rngs::StdRng;

use super::handoff::{Confirmed, Leases, confirmed, fan_out};
use super::lanes::{Replies, Work};
use super::rows::{get, id, uuid};
use super::session::Session;
use super::time::span;
use super::verbs::{Answers, IDLE_ROUNDS, Place, stored, unknown};
use crate::message::{Effect, MessageEvent, MessageId, MessageState, WrongState};
use crate::store::kind::Kind;
use crate::store::{Decision, Handoff, Refusal, Written};

/// The lane of confirm and cancel.
pub(super) struct Decide(pub(super) StdRng);

impl Work for Decide {
    type Call = (String, Vec<Decision>, Handoff);
    type Reply = Written;

    fn kind(&self) -> Kind {
        Kind::Decide
    }

    fn size((_, decisions, _): &Self::Call) -> (usize, usize) {
        (decisions.len(), 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Written>, sqlx::Error> {
        let mut answers = Answers::new(calls.iter().map(|(_, decisions, _)| decisions.len()));
        let handoffs = calls.iter().map(|(.., handoff)| handoff);
        let mut leases = Leases::joined(handoffs, &mut self.0);
        let mut open: Vec<Decided<'_>> = Vec::new();
        for (call, (producer, decisions, _)) in calls.iter().enumerate() {
            for (item, decision) in decisions.iter().enumerate() {
                let place = Place { call, item };
                open.push(Decided {
                    place,
                    producer,
                    id: decision.id,
                    event: decision.event,
                });
            }
        }
        let mut idle = 0;
        while !open.is_empty() && idle < IDLE_ROUNDS {
            let before = open.len();
            open = decide_round(db, open, &mut leases, &mut answers).await?;
            idle = if open.len() < before { 0 } else { idle + 1 };
        }
        Ok(answers.finish(Kind::Decide.doing(), open.iter().map(|item| item.place)))
    }
}

struct Decided<'a> {
    place: Place,
    producer: &'a str,
    id: MessageId,
    event: MessageEvent,
}

/// Writes the first decision about each message, reads what was not written, and returns what
/// has to go round again.
async fn decide_round<'a>(
    db: &mut Session,
    open: Vec<Decided<'a>>,
    leases: &mut Leases,
    answers: &mut Answers,
) -> Result<Vec<Decided<'a>>, sqlx::Error> {
    let mut seen = HashSet::new();
    let turn: Vec<_> = open.iter().map(|item| seen.insert(item.id)).collect();
    let first: Vec<_> = open
        .iter()
        .zip(&turn)
        .filter(|(_, first)| **first)
        .map(|(item, _)| (item.id, item.producer, target(item.event)))
        .collect();
    let mut moved = decide(db, &first, leases).await?;
    let mut rest = Vec::new();
    for (item, first) in open.into_iter().zip(turn) {
        match moved.remove(&item.id).filter(|_| first) {
            Some(confirmed) => {
                answers.item(item.place, Ok(target(item.event)));
                answers.confirmed(item.place, confirmed);
            }
            None => rest.push(item),
        }
    }
    let stored = stored(db, rest.iter().map(|item| item.id), Kind::Decide.doing()).await?;
    let mut again = Vec::new();
    let mut conflicts = Vec::new();
    for item in rest {
        let found = stored
            .get(&item.id)
            .filter(|stored| stored.producer == item.producer);
        let Some(found) = found else {
            answers.item(item.place, Err(Refusal::NoSuchMessage(item.id)));
            continue;
        };
        match &found.state {
            Err(word) => answers.fail(item.place, unknown(Kind::Decide.doing(), word)),
            Ok(state) => match state.apply(item.event) {
                Ok(Effect::AlreadySo) => answers.item(item.place, Ok(*state)),
                Ok(Effect::Moves(_)) => again.push(item),
                Err(wrong) => {
                    if wrong.is_conflict() {
                        conflicts.push((item.id, wrong));
                    }
                    let id = item.id;
                    answers.item(item.place, Err(Refusal::WrongState { id, wrong }));
                }
            },
        }
    }
    mark_conflicts(db, &conflicts).await?;
    Ok(again)
}

/// What an event would make of a PREPARED message.
pub(super) const fn target(event: MessageEvent) -> MessageState {
    match event {
        MessageEvent::Cancel => MessageState::Cancelled,
        MessageEvent::Confirm | MessageEvent::Publish => MessageState::Confirmed,
        MessageEvent::Prepare => MessageState::Prepared,
    }
}

/// Confirms or cancels PREPARED messages of these producers, with their deliveries. Returns
/// those it moved.
pub(super) async fn decide(
    db: &mut Session,
    decisions: &[(MessageId, &str, MessageState)],
    leases: &mut Leases,
) -> Result<HashMap<MessageId, Confirmed>, sqlx::Error> {
    if decisions.is_empty() {
        return Ok(HashMap::new());
    }
    let ids: Vec<_> = decisions.iter().map(|(id, ..)| uuid(*id)).collect();
    let producers: Vec<_> = decisions.iter().map(|(_, producer, _)| *producer).collect();
    let states: Vec<_> = decisions.iter().map(|(.., state)| state.as_str()).collect();
    let (names, room) = leases.room();
    let rows = db
        .fetch(&decide_sql(), |query| {
            query
                .bind(&ids)
                .bind(&producers)
                .bind(&states)
                .bind(&names)
                .bind(&room)
                .bind(span(leases.lease))
                .bind(leases.token)
        })
        .await?;
    confirmed(&rows, leases)
}

/// Locks along the primary key, moves, and fans out to who is subscribed at this moment.
pub(super) fn decide_sql() -> String {
    let fan_out = fan_out(4);
    format!(
        "-- decide
        WITH input AS MATERIALIZED (
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[]) AS i(id, producer, state)
        ), locked AS MATERIALIZED (
            SELECT m.id, i.state FROM input i JOIN message m ON m.id = ANY (ARRAY[i.id])
             WHERE (m.producer = i.producer AND m.state = 'PREPARED') IS TRUE
             ORDER BY i.id FOR UPDATE OF m /* waits */
        ), decided AS (
            UPDATE message m
               SET state = l.state, decided_at = clock_timestamp(), decided_by = 'PRODUCER',
                   check_at = NULL, check_token = NULL, unresolved = false,
                   unsubscribed = l.state = 'CONFIRMED' AND NOT EXISTS (
                       SELECT FROM subscription s WHERE s.topic = m.topic AND s.active)
              FROM locked l WHERE m.id = ANY (ARRAY[l.id])
            RETURNING m.id, m.state, m.topic, m.deliver_after, m.decided_at, m.producer, m.key,
                      m.bucket, m.body_bytes, m.content_hash
        ), {fan_out}"
    )
}

/// Marks messages whose decision was contradicted. The first contradiction is kept.
pub(super) async fn mark_conflicts(
    db: &mut Session,
    conflicts: &[(MessageId, WrongState)],
) -> Result<(), sqlx::Error> {
    let mut details: HashMap<MessageId, String> = HashMap::new();
    for (id, wrong) in conflicts {
        details.entry(*id).or_insert_with(|| wrong.to_string());
    }
    if details.is_empty() {
        return Ok(());
    }
    let ids: Vec<_> = details.keys().map(|id| uuid(*id)).collect();
    let texts: Vec<_> = details.values().map(String::as_str).collect();
    let rows = db
        .fetch(
            "-- mark conflicts
             WITH input AS MATERIALIZED (
                 SELECT * FROM unnest($1::uuid[], $2::text[]) AS i(id, detail)
             ), locked AS MATERIALIZED (
                 SELECT m.id, i.detail FROM input i JOIN message m ON m.id = ANY (ARRAY[i.id])
                  WHERE NOT m.conflict
                  ORDER BY i.id FOR UPDATE OF m /* waits */
             ), marked AS (
                 UPDATE message m SET conflict = true FROM locked l WHERE m.id = ANY (ARRAY[l.id])
                 RETURNING m.id, l.detail
             ), events AS (
                 INSERT INTO message_event (message_id, at, kind, detail)
                 SELECT id, clock_timestamp(), 'conflict', detail FROM marked
             )
             SELECT id, detail FROM marked",
            |query| query.bind(&ids).bind(&texts),
        )
        .await?;
    for row in &rows {
        let (id, detail) = (id(row, "id")?, get::<&str>(row, "detail")?);
        tracing::error!(message.id = %id, detail, "a final decision was contradicted");
    }
    Ok(())
}
