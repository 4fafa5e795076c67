//! Messages that are handed over: prepare and publish.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use sqlx::postgres::types::PgInterval;
use uuid::Uuid;

use super::bodies::Bodies;
use super::decisions::{decide, mark_conflicts, target};
use super::handoff::{Confirmed, Leases, confirmed, fan_out};
use super::lanes::{Replies, Work};
use super::rows::{clean, get, id, long, message_state, uuid};
use super::session::{Session, Trouble, trouble};
use super::time::{At, span};
use super::verbs::{Answers, IDLE_ROUNDS, Place, stored, unknown};
use crate::message::{ContentHash, Effect, MessageEvent, MessageId, MessageState, NewMessage};
use crate::store::kind::Kind;
use crate::store::{Error, Handoff, Refusal, Written};

/// The lane of prepare.
pub(super) struct Prepare(pub(super) Arc<Bodies>);

impl Work for Prepare {
    type Call = (Vec<NewMessage>, Duration);
    type Reply = Written;

    fn kind(&self) -> Kind {
        Kind::Prepare
    }

    fn size((messages, _): &Self::Call) -> (usize, usize) {
        (
            messages.len(),
            messages.iter().map(NewMessage::body_bytes).sum(),
        )
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Written>, sqlx::Error> {
        let lists = calls.iter().map(|(messages, wait)| (&messages[..], *wait));
        let mut leases = Leases::none();
        let lists = lists.collect();
        hand_over(db, &self.0, MessageEvent::Prepare, lists, &mut leases).await
    }
}

/// The lane of publish.
pub(super) struct Publish(pub(super) Arc<Bodies>, pub(super) StdRng);

impl Work for Publish {
    type Call = (Vec<NewMessage>, Handoff);
    type Reply = Written;

    fn kind(&self) -> Kind {
        Kind::Publish
    }

    fn size((messages, _): &Self::Call) -> (usize, usize) {
        (
            messages.len(),
            messages.iter().map(NewMessage::body_bytes).sum(),
        )
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Self::Call],
    ) -> Result<Replies<Written>, sqlx::Error> {
        let lists = calls.iter();
        let lists = lists.map(|(messages, _)| (&messages[..], Duration::ZERO));
        let handoffs = calls.iter().map(|(_, handoff)| handoff);
        let mut leases = Leases::joined(handoffs, &mut self.1);
        let lists = lists.collect();
        hand_over(db, &self.0, MessageEvent::Publish, lists, &mut leases).await
    }
}

/// A message that is handed over.
struct Handed<'a> {
    place: Place,
    message: &'a NewMessage,
    hash: ContentHash,
    check_after: Duration,
}

/// A key belongs to producer and topic.
type Key<'a> = (&'a str, &'a str, &'a str);

fn key(message: &NewMessage) -> Option<Key<'_>> {
    let key = message.key.as_deref()?;
    Some((&message.producer, &message.topic, key))
}

async fn hand_over(
    db: &mut Session,
    bodies: &Bodies,
    event: MessageEvent,
    lists: Vec<(&[NewMessage], Duration)>,
    leases: &mut Leases,
) -> Result<Replies<Written>, sqlx::Error> {
    let doing = match event {
        MessageEvent::Publish => Kind::Publish.doing(),
        MessageEvent::Prepare | MessageEvent::Confirm | MessageEvent::Cancel => {
            Kind::Prepare.doing()
        }
    };
    let mut answers = Answers::new(lists.iter().map(|(messages, _)| messages.len()));
    let mut open = Vec::new();
    for (call, (messages, check_after)) in lists.into_iter().enumerate() {
        for (item, message) in messages.iter().enumerate() {
            open.push(Handed {
                place: Place { call, item },
                message,
                hash: message.content_hash(),
                check_after,
            });
        }
    }
    let mut idle = 0;
    while !open.is_empty() && idle < IDLE_ROUNDS {
        let before = open.len();
        open = hand_over_round(db, bodies, event, doing, open, leases, &mut answers).await?;
        idle = if open.len() < before { 0 } else { idle + 1 };
        if idle > 0 {
            bodies.bucket.forget();
        }
    }
    Ok(answers.finish(doing, open.iter().map(|item| item.place)))
}

/// Inserts the first message under each id and key, reads what was not inserted, and returns
/// what has to go round again.
async fn hand_over_round<'a>(
    db: &mut Session,
    bodies: &Bodies,
    event: MessageEvent,
    doing: &'static str,
    open: Vec<Handed<'a>>,
    leases: &mut Leases,
    answers: &mut Answers,
) -> Result<Vec<Handed<'a>>, sqlx::Error> {
    let (mut ids, mut keys) = (HashSet::new(), HashSet::new());
    // A key's second bearer waits, so that the first in the list is the holder. So does whatever
    // shares its id, since an id that is refused for its key is still free.
    let turn: Vec<bool> = open
        .iter()
        .map(|item| {
            let key_is_new = key(item.message).is_none_or(|key| keys.insert(key));
            ids.insert(item.message.id) && key_is_new
        })
        .collect();
    let first: Vec<_> = open
        .iter()
        .zip(&turn)
        .filter(|(_, first)| **first)
        .map(|(item, _)| item)
        .collect();
    let mut inserted = insert(db, bodies, event, &first, leases).await?;
    let mut rest = Vec::new();
    for (item, first) in open.into_iter().zip(turn) {
        let id = item.message.id;
        match inserted.remove(&id).filter(|_| first) {
            Some(confirmed) => {
                bodies.recent.keep(item.message, item.hash);
                answers.item(item.place, Ok(target(event)));
                if let Some(confirmed) = confirmed {
                    answers.confirmed(item.place, confirmed);
                }
            }
            None => rest.push(item),
        }
    }
    if rest.is_empty() {
        return Ok(rest);
    }
    read_round(db, event, doing, rest, answers).await
}

/// Answers what is stored under the ids and keys of these messages.
async fn read_round<'a>(
    db: &mut Session,
    event: MessageEvent,
    doing: &'static str,
    rest: Vec<Handed<'a>>,
    answers: &mut Answers,
) -> Result<Vec<Handed<'a>>, sqlx::Error> {
    let stored = stored(db, rest.iter().map(|item| item.message.id), doing).await?;
    let keyless = |item: &&Handed<'a>| !stored.contains_key(&item.message.id);
    let wanted = rest
        .iter()
        .filter(keyless)
        .filter_map(|item| key(item.message));
    let holders = holders(db, wanted.collect(), doing).await?;
    let (mut again, mut moving) = (Vec::new(), Vec::new());
    let (mut conflicts, mut to_check) = (Vec::new(), Vec::new());
    for item in rest {
        let message = item.message;
        let id = message.id;
        let Some(found) = stored.get(&id) else {
            match key(message).and_then(|key| holders.get(&owned(key))) {
                // Neither the id nor the key is there: somebody's insert was rolled back.
                None => again.push(item),
                Some((_, Err(error))) => answers.fail(item.place, unknown(doing, error)),
                Some((holder, Ok(state))) => {
                    if *state == MessageState::Prepared {
                        to_check.push(*holder);
                    }
                    let (holder, state) = (*holder, *state);
                    answers.item(item.place, Err(Refusal::KeyHeld { holder, state }));
                }
            }
            continue;
        };
        if found.producer != message.producer {
            answers.item(item.place, Err(Refusal::IdTaken(id)));
            continue;
        }
        let state = match &found.state {
            Ok(state) => *state,
            Err(error) => {
                answers.fail(item.place, unknown(doing, error));
                continue;
            }
        };
        if found.content_hash != item.hash.as_bytes() {
            answers.item(item.place, Err(Refusal::OtherContent { id, state }));
            continue;
        }
        match state.apply(event) {
            Ok(Effect::AlreadySo) => answers.item(item.place, Ok(state)),
            Ok(Effect::Moves(_)) => moving.push(item),
            Err(wrong) => {
                if wrong.is_conflict() {
                    conflicts.push((id, wrong));
                }
                answers.item(item.place, Err(Refusal::WrongState { id, wrong }));
            }
        }
    }
    mark_conflicts(db, &conflicts).await?;
    check_at_once(db, to_check).await?;
    again.extend(confirm_prepared(db, moving, answers).await?);
    Ok(again)
}

/// Publishing what was prepared confirms it.
async fn confirm_prepared<'a>(
    db: &mut Session,
    moving: Vec<Handed<'a>>,
    answers: &mut Answers,
) -> Result<Vec<Handed<'a>>, sqlx::Error> {
    let mut seen = HashSet::new();
    let confirmed = MessageState::Confirmed;
    let first: Vec<_> = moving
        .iter()
        .filter(|item| seen.insert(item.message.id))
        .map(|item| (item.message.id, item.message.producer.as_str(), confirmed))
        .collect();
    // What is published twice is rare: its deliveries are due for anybody.
    let mut moved = decide(db, &first, &mut Leases::none()).await?;
    let mut again = Vec::new();
    for item in moving {
        match moved.remove(&item.message.id) {
            Some(moved) => {
                answers.confirmed(item.place, moved);
                answers.item(item.place, Ok(confirmed));
            }
            None => again.push(item),
        }
    }
    Ok(again)
}

/// A crashed try must not hold a key for long: ask about it now, unless it is being asked about.
async fn check_at_once(db: &mut Session, holders: Vec<MessageId>) -> Result<(), sqlx::Error> {
    if holders.is_empty() {
        return Ok(());
    }
    let ids: Vec<_> = holders.into_iter().map(uuid).collect();
    db.fetch(
        "-- check holders now
         WITH locked AS MATERIALIZED (
             SELECT m.id FROM message m
              WHERE m.id = ANY($1) AND (m.state = 'PREPARED' AND m.check_token IS NULL
                                         AND m.check_at > clock_timestamp()) IS TRUE
              ORDER BY m.id FOR UPDATE OF m /* waits */
         )
         UPDATE message m SET check_at = clock_timestamp() FROM locked l
          WHERE m.id = ANY (ARRAY[l.id])
         RETURNING m.id",
        |query| query.bind(&ids),
    )
    .await?;
    Ok(())
}

type OwnedKey = (String, String, String);

fn owned((producer, topic, key): Key<'_>) -> OwnedKey {
    (producer.to_owned(), topic.to_owned(), key.to_owned())
}

/// Who holds these keys.
async fn holders(
    db: &mut Session,
    keys: Vec<Key<'_>>,
    doing: &'static str,
) -> Result<HashMap<OwnedKey, (MessageId, Result<MessageState, Error>)>, sqlx::Error> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let producers: Vec<_> = keys.iter().map(|key| key.0).collect();
    let topics: Vec<_> = keys.iter().map(|key| key.1).collect();
    let words: Vec<_> = keys.iter().map(|key| key.2).collect();
    let rows = db
        .fetch(
            "-- who holds the keys
             SELECT m.id, m.state, m.producer, m.topic, m.key
               FROM unnest($1::text[], $2::text[], $3::text[]) AS i(producer, topic, key)
               JOIN message m ON m.producer = i.producer AND m.topic = i.topic AND m.key = i.key
              WHERE m.key IS NOT NULL AND m.state <> 'CANCELLED'",
            |query| query.bind(&producers).bind(&topics).bind(&words),
        )
        .await?;
    rows.iter()
        .map(|row| {
            let key = (get(row, "producer")?, get(row, "topic")?, get(row, "key")?);
            Ok((key, (id(row, "id")?, message_state(row, doing)?)))
        })
        .collect()
}

/// Inserts messages with their bodies and, published, their deliveries. Returns those that were
/// new, with what became of the deliveries.
async fn insert(
    db: &mut Session,
    bodies: &Bodies,
    event: MessageEvent,
    items: &[&Handed<'_>],
    leases: &mut Leases,
) -> Result<HashMap<MessageId, Option<Confirmed>>, sqlx::Error> {
    if items.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = Rows::of(items)?;
    let number = bodies.bucket.number(db).await?;
    let inserted = match insert_into(db, number, event, &rows, leases).await {
        // The bucket is gone: this process slept through its whole life.
        Err(error) if trouble(&error) == Trouble::NoSuchTable => {
            bodies.bucket.forget();
            let number = bodies.bucket.number(db).await?;
            insert_into(db, number, event, &rows, leases).await?
        }
        inserted => inserted?,
    };
    if event == MessageEvent::Publish {
        let inserted = confirmed(&inserted, leases)?.into_iter();
        return Ok(inserted.map(|(id, one)| (id, Some(one))).collect());
    }
    let inserted = inserted.iter();
    inserted.map(|row| Ok((id(row, "id")?, None))).collect()
}

async fn insert_into(
    db: &mut Session,
    bucket: i64,
    event: MessageEvent,
    rows: &Rows<'_>,
    leases: &Leases,
) -> Result<Vec<sqlx::postgres::PgRow>, sqlx::Error> {
    let is_publish = event == MessageEvent::Publish;
    let sql = if is_publish {
        publish_sql(bucket)
    } else {
        prepare_sql(bucket)
    };
    let (names, room) = leases.room();
    db.fetch(&sql, |query| {
        let query = query
            .bind(&rows.ids)
            .bind(&rows.producers)
            .bind(&rows.topics)
            .bind(&rows.keys)
            .bind(&rows.hashes)
            .bind(&rows.bytes)
            .bind(&rows.fences)
            .bind(&rows.deliver_after)
            .bind(&rows.check_after)
            .bind(&rows.content_types)
            .bind(&rows.headers)
            .bind(&rows.payloads);
        if !is_publish {
            return query;
        }
        query
            .bind(&names)
            .bind(&room)
            .bind(span(leases.lease))
            .bind(leases.token)
    })
    .await
}

/// Messages as columns.
struct Rows<'a> {
    ids: Vec<Uuid>,
    producers: Vec<&'a str>,
    topics: Vec<&'a str>,
    keys: Vec<Option<&'a str>>,
    hashes: Vec<Vec<u8>>,
    bytes: Vec<i64>,
    fences: Vec<Option<Uuid>>,
    deliver_after: Vec<Option<At>>,
    check_after: Vec<PgInterval>,
    content_types: Vec<String>,
    headers: Vec<String>,
    payloads: Vec<&'a [u8]>,
}

impl<'a> Rows<'a> {
    fn of(items: &[&Handed<'a>]) -> Result<Self, sqlx::Error> {
        let messages = || items.iter().map(|item| item.message);
        Ok(Self {
            ids: messages().map(|message| uuid(message.id)).collect(),
            producers: messages()
                .map(|message| message.producer.as_str())
                .collect(),
            topics: messages().map(|message| message.topic.as_str()).collect(),
            keys: messages().map(|message| message.key.as_deref()).collect(),
            hashes: items
                .iter()
                .map(|item| item.hash.as_bytes().to_vec())
                .collect(),
            bytes: messages()
                .map(|message| long(message.body_bytes()))
                .collect(),
            fences: messages().map(|message| message.fence).collect(),
            deliver_after: messages()
                .map(|message| message.deliver_after.map(At))
                .collect(),
            check_after: items.iter().map(|item| span(item.check_after)).collect(),
            content_types: messages()
                .map(|message| clean(&message.content_type))
                .collect(),
            headers: messages()
                .map(|message| serde_json::to_string(&message.headers))
                .collect::<Result<_, _>>()
                .map_err(|source| sqlx::Error::Encode(Box::new(source)))?,
            payloads: messages().map(|message| &message.payload[..]).collect(),
        })
    }
}

/// The rows of a batch as a table.
const INPUT: &str = "input AS MATERIALIZED (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[],
                             $6::bigint[], $7::uuid[], $8::timestamptz[], $9::interval[],
                             $10::text[], $11::text[], $12::bytea[])
            AS i(id, producer, topic, key, content_hash, body_bytes, fence, deliver_after,
                 check_after, content_type, headers, payload)
    )";

/// The bodies of what was inserted. `IS TRUE` keeps the planner from comparing each with each.
fn bodies_sql(bucket: i64) -> String {
    format!(
        "bodies AS (
            INSERT INTO body_{bucket} (message_id, content_type, headers, payload)
            SELECT id, content_type, headers, payload FROM input
             WHERE (id IN (SELECT id FROM made)) IS TRUE
        )"
    )
}

/// Inserts go along the unique keys: two batches that share some wait for each other in one
/// direction only.
fn prepare_sql(bucket: i64) -> String {
    let bodies = bodies_sql(bucket);
    format!(
        "-- prepare
        WITH {INPUT}, made AS (
            INSERT INTO message (id, producer, topic, key, state, content_hash, bucket,
                                 body_bytes, fence, deliver_after, check_at, prepared_at)
            SELECT id, producer, topic, key, 'PREPARED', content_hash, {bucket}, body_bytes, fence,
                   deliver_after, clock_timestamp() + check_after, clock_timestamp()
              FROM input
             WHERE EXISTS (SELECT FROM body_bucket WHERE number = {bucket} AND NOT closed)
             ORDER BY producer COLLATE \"C\", topic COLLATE \"C\", key COLLATE \"C\", id
            ON CONFLICT DO NOTHING
            RETURNING id
        ), {bodies}
        SELECT id FROM made"
    )
}

fn publish_sql(bucket: i64) -> String {
    let (bodies, fan_out) = (bodies_sql(bucket), fan_out(13));
    format!(
        "-- publish
        WITH {INPUT}, t AS MATERIALIZED (
            SELECT clock_timestamp() AS now
        ), made AS (
            INSERT INTO message (id, producer, topic, key, state, content_hash, bucket,
                                 body_bytes, fence, deliver_after, prepared_at, decided_at,
                                 decided_by, unsubscribed)
            SELECT i.id, i.producer, i.topic, i.key, 'CONFIRMED', i.content_hash, {bucket},
                   i.body_bytes, i.fence, i.deliver_after, (SELECT now FROM t), (SELECT now FROM t),
                   'PRODUCER', NOT EXISTS (
                       SELECT FROM subscription s WHERE s.topic = i.topic AND s.active)
              FROM input i
             WHERE EXISTS (SELECT FROM body_bucket WHERE number = {bucket} AND NOT closed)
             ORDER BY i.producer COLLATE \"C\", i.topic COLLATE \"C\", i.key COLLATE \"C\", i.id
            ON CONFLICT DO NOTHING
            RETURNING id, state, topic, deliver_after, decided_at, producer, key, bucket,
                      body_bytes, content_hash
        ), {bodies}, decided AS MATERIALIZED (
            SELECT * FROM made
        ), {fan_out}"
    )
}
