//! Deliveries that are leased in the statement that creates them.
//!
//! A confirm that leaves its deliveries due needs a second write before they can be sent: the
//! claim. With a handoff the caller names how many deliveries of which subscription its own
//! process can send now, and the confirm leases so many. The others are due at once for anybody.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::bodies::{self, Body};
use super::rows::{at, get, hash, id, long, wrong};
use super::session::Session;
use crate::message::MessageId;
use crate::store::{DeliveryClaim, Handed, Handoff};

/// The generation of a first send.
const FIRST: u32 = 1;

/// What the calls of one batch may lease together. It shrinks with what was leased.
pub(super) struct Leases {
    pub(super) lease: Duration,
    /// One token serves the whole batch, as it does for a claim.
    pub(super) token: Uuid,
    room: BTreeMap<String, usize>,
}

impl Leases {
    pub(super) fn joined<'a>(
        handoffs: impl Iterator<Item = &'a Handoff>,
        rng: &mut StdRng,
    ) -> Self {
        let mut joined = Self::none();
        joined.token = uuid::Builder::from_random_bytes(rng.random()).into_uuid();
        for handoff in handoffs {
            joined.lease = joined.lease.max(handoff.lease);
            for (subscription, room) in &handoff.room {
                *joined.room.entry(subscription.clone()).or_default() += room;
            }
        }
        joined
    }

    pub(super) fn none() -> Self {
        Self {
            lease: Duration::ZERO,
            token: Uuid::nil(),
            room: BTreeMap::new(),
        }
    }

    /// Names and numbers, for the two arrays of the statement.
    pub(super) fn room(&self) -> (Vec<&str>, Vec<i64>) {
        let room = self.room.iter();
        room.map(|(name, room)| (name.as_str(), long(*room)))
            .unzip()
    }

    fn used(&mut self, subscription: &str) {
        if let Some(room) = self.room.get_mut(subscription) {
            *room = room.saturating_sub(1);
        }
    }
}

/// What became of a message that was decided.
pub(super) struct Confirmed {
    pub(super) topic: String,
    /// It has deliveries that anybody may claim.
    pub(super) is_due: bool,
    pub(super) handed: Vec<Handed>,
}

/// The end of a statement that decides: it creates the deliveries of the rows of `decided`
/// for who is subscribed at this moment, leases what there is room for, and says both. The
/// parameters from `first` on are names, their room, the lease, and its token.
pub(super) fn fan_out(first: usize) -> String {
    let (names, room, lease, token) = (first, first + 1, first + 2, first + 3);
    format!(
        "room AS MATERIALIZED (
            SELECT * FROM unnest(${names}::text[], ${room}::bigint[]) AS r(subscription, room)
        ), wanted AS MATERIALIZED (
            SELECT d.id, s.name, d.deliver_after, d.decided_at,
                   coalesce(d.deliver_after <= d.decided_at, true)
                   AND row_number() OVER (PARTITION BY s.name ORDER BY d.id)
                       <= coalesce(r.room, 0) AS handed
              FROM decided d JOIN subscription s ON s.topic = d.topic AND s.active
              LEFT JOIN room r ON r.subscription = s.name
             WHERE d.state = 'CONFIRMED'
        ), deliveries AS (
            INSERT INTO delivery (message_id, subscription, state, due_at, confirmed_at,
                                  token, generation, sent_at, first_sent_at)
            SELECT id, name, 'PENDING',
                   CASE WHEN handed THEN decided_at + ${lease}::interval
                        ELSE greatest(deliver_after, decided_at) END,
                   decided_at, CASE WHEN handed THEN ${token}::uuid END, handed::int,
                   CASE WHEN handed THEN decided_at END, CASE WHEN handed THEN decided_at END
              FROM wanted ORDER BY id, name
            RETURNING message_id, subscription, token IS NOT NULL AS handed, sent_at
        )
        SELECT id, topic, producer, key, bucket, body_bytes, content_hash,
               NULL::text AS subscription, false AS handed, NULL::timestamptz AS sent_at
          FROM decided
        UNION ALL
        SELECT message_id, NULL, NULL, NULL, NULL, NULL, NULL, subscription, handed, sent_at
          FROM deliveries"
    )
}

/// Reads what [`fan_out`] said.
pub(super) fn confirmed(
    rows: &[PgRow],
    leases: &mut Leases,
) -> Result<HashMap<MessageId, Confirmed>, sqlx::Error> {
    let of = |row| get::<Option<String>>(row, "subscription");
    let mut decided: HashMap<MessageId, (Confirmed, &PgRow)> = HashMap::new();
    for row in rows {
        if of(row)?.is_none() {
            let confirmed = Confirmed {
                topic: get(row, "topic")?,
                is_due: false,
                handed: Vec::new(),
            };
            decided.insert(id(row, "id")?, (confirmed, row));
        }
    }
    for row in rows {
        let Some(subscription) = of(row)? else {
            continue;
        };
        let id = id(row, "id")?;
        let (confirmed, message) = decided
            .get_mut(&id)
            .ok_or_else(|| wrong("id", "belongs to no message that was decided"))?;
        if !get::<bool>(row, "handed")? {
            confirmed.is_due = true;
            continue;
        }
        leases.used(&subscription);
        confirmed.handed.push(Handed {
            subscription,
            id,
            token: leases.token,
            producer: get(message, "producer")?,
            topic: confirmed.topic.clone(),
            key: get(message, "key")?,
            sent_at: at(row, "sent_at")?,
            body_bytes: usize::try_from(get::<i64>(message, "body_bytes")?)
                .map_err(|_| wrong("body_bytes", "is negative"))?,
            bucket: get(message, "bucket")?,
            content_hash: hash(message, "content_hash")?,
        });
    }
    let confirmed = |(id, (confirmed, _))| (id, confirmed);
    Ok(decided.into_iter().map(confirmed).collect())
}

/// Reads the bodies of what was handed over.
pub(super) async fn load(
    db: &mut Session,
    handed: &[Handed],
) -> Result<Vec<Option<DeliveryClaim>>, sqlx::Error> {
    let wanted: HashMap<_, _> = handed.iter().map(|one| (one.id, one.bucket)).collect();
    let bodies = bodies::read(db, wanted).await?;
    let load = |one: &Handed| Some(claim(one, bodies.get(&one.id)?));
    Ok(handed.iter().map(load).collect())
}

/// What was handed over, with its body.
pub(super) fn claim(one: &Handed, body: &Body) -> DeliveryClaim {
    DeliveryClaim {
        id: one.id,
        generation: FIRST,
        token: one.token,
        producer: one.producer.clone(),
        topic: one.topic.clone(),
        key: one.key.clone(),
        content_type: body.content_type.clone(),
        headers: body.headers.clone(),
        payload: body.payload.clone(),
        sent_at: one.sent_at,
        first_sent_at: one.sent_at,
    }
}
