//! The processes on one database, and what each tells the others.

use uuid::Uuid;

use super::lanes::{Replies, Work};
use super::rows::{at, get, long, many, maybe_at};
use super::session::Session;
use super::time::{At, span};
use crate::store::kind::Kind;
use crate::store::{ALIVE_FOR, Heard, Presence, REMEMBERED_FOR, ReplicaView};

/// The lane of presence.
pub(super) struct Announce;

/// What a process says.
pub(super) enum Said {
    Here(Presence),
    Gone(Uuid),
}

impl Work for Announce {
    type Call = Said;
    type Reply = Heard;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Announce
    }

    fn size(_: &Said) -> (usize, usize) {
        (1, 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Said],
    ) -> Result<Replies<Heard>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for said in calls {
            replies.push(Ok(match said {
                Said::Here(presence) => {
                    announce(db, presence).await?;
                    heard(db).await?
                }
                Said::Gone(id) => {
                    leave(db, *id).await?;
                    Heard::default()
                }
            }));
        }
        Ok(replies)
    }
}

async fn announce(db: &mut Session, presence: &Presence) -> Result<(), sqlx::Error> {
    let (names, through): (Vec<_>, Vec<_>) = presence
        .answered
        .iter()
        .map(|(name, through)| (name.as_str(), through.map(At)))
        .unzip();
    let held = |number| long(usize::try_from(number).unwrap_or(usize::MAX));
    db.fetch(
        "-- announce a replica
         WITH t AS MATERIALIZED (
             SELECT clock_timestamp() AS now
         ), gone AS (
             DELETE FROM replica WHERE id IN (
                 SELECT id FROM replica WHERE id <> $1 AND seen_at < (SELECT now FROM t) - $8
                    FOR UPDATE SKIP LOCKED)
         ), here AS (
             INSERT INTO replica AS r (id, version, address, started_at, seen_at, deliveries,
                                       checks)
             SELECT $1, $2, $3, now, now, $4, $5 FROM t
             ON CONFLICT (id) DO UPDATE SET seen_at = greatest(r.seen_at, excluded.seen_at),
                deliveries = excluded.deliveries, checks = excluded.checks
         ), news AS (
             INSERT INTO answered AS a (subscription, through, answered_at)
             SELECT i.subscription, CASE WHEN i.through > now THEN now ELSE i.through END, now
               FROM unnest($6::text[], $7::timestamptz[]) AS i(subscription, through), t
              ORDER BY i.subscription
             ON CONFLICT (subscription) DO UPDATE
                SET through = greatest(a.through, excluded.through),
                    answered_at = greatest(a.answered_at, excluded.answered_at)
         )
         SELECT now FROM t",
        |query| {
            query
                .bind(presence.id)
                .bind(&presence.version)
                .bind(&presence.address)
                .bind(held(presence.deliveries))
                .bind(held(presence.checks))
                .bind(&names)
                .bind(&through)
                .bind(span(REMEMBERED_FOR))
        },
    )
    .await?;
    Ok(())
}

async fn heard(db: &mut Session) -> Result<Heard, sqlx::Error> {
    let rows = db
        .fetch(
            "-- what all have heard
             WITH t AS MATERIALIZED (SELECT clock_timestamp() AS now)
             SELECT NULL::text AS subscription, NULL::timestamptz AS through, now AS answered_at,
                    now, (SELECT count(*) FROM replica WHERE seen_at > now - $1) AS alive,
                    (SELECT topology_version FROM store) AS topology_version
               FROM t
             UNION ALL
             SELECT subscription, through, answered_at, now, 0, 0 FROM answered, t",
            |query| query.bind(span(ALIVE_FOR)),
        )
        .await?;
    let mut heard = Heard::default();
    for row in &rows {
        let Some(subscription) = get::<Option<String>>(row, "subscription")? else {
            heard.alive = u32::try_from(many(row, "alive")?).unwrap_or(u32::MAX);
            heard.topology_version = many(row, "topology_version")?;
            continue;
        };
        let ago = at(row, "now")?.since(at(row, "answered_at")?);
        let through = maybe_at(row, "through")?;
        heard.answered.push((subscription, through, ago));
    }
    Ok(heard)
}

async fn leave(db: &mut Session, id: Uuid) -> Result<(), sqlx::Error> {
    let sql = "-- a replica ends\nDELETE FROM replica WHERE id = $1 RETURNING id";
    db.fetch(sql, |query| query.bind(id)).await?;
    Ok(())
}

pub(super) async fn replicas(db: &mut Session) -> Result<Vec<ReplicaView>, sqlx::Error> {
    let rows = db
        .fetch(
            "-- replicas
             SELECT id, version, address, started_at, seen_at, deliveries, checks FROM replica
              ORDER BY started_at, id LIMIT 1000",
            |query| query,
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(ReplicaView {
                id: get(row, "id")?,
                version: get(row, "version")?,
                address: get(row, "address")?,
                started_at: at(row, "started_at")?,
                seen_at: at(row, "seen_at")?,
                deliveries: many(row, "deliveries")?,
                checks: many(row, "checks")?,
            })
        })
        .collect()
}
