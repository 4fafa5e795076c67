//! The topology in the store.
//!
//! It is applied in one transaction over rows of its own tables, which nobody else locks but the
//! pass that settles what was removed. What a removed subscription leaves open is skipped
//! behind it, in batches, and again by later passes: a confirm that began before may still add to
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{Connection as _, Row as _};

use super::lanes::{Replies, Work};
use super::rows::{get, long, wrong};
use super::session::{Session, Trouble, trouble};
use super::time::span;
use crate::message::{CheckPolicy, DeliveryPolicy};
use crate::store::kind::Kind;
use crate::store::{Applied, Error, policy};
use crate::topology::{Producer, Subscription, Topic, Topology};

/// How often applying is begun again after a deadlock, or after it has waited a second for another
/// process that applies.
const TRIES: u32 = 15;
/// Deliveries that one statement skips.
const SKIP_ROWS: usize = 500;
/// Longer than a statement can take: a confirm that began before a change is over by then.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// The lane of topologies.
pub(super) struct Apply;

impl Work for Apply {
    type Call = Topology;
    type Reply = Applied;

    const JOINS: bool = false;

    fn kind(&self) -> Kind {
        Kind::Topology
    }

    fn size(_: &Topology) -> (usize, usize) {
        (1, 0)
    }

    async fn run(
        &mut self,
        db: &mut Session,
        calls: &[Topology],
    ) -> Result<Replies<Applied>, sqlx::Error> {
        let mut replies = Vec::with_capacity(calls.len());
        for topology in calls {
            let reply = apply_repeatedly(db, topology).await?;
            if matches!(reply, Ok(Applied::Changed)) {
                skip_leftovers(db).await?;
            }
            replies.push(reply);
        }
        Ok(replies)
    }
}

async fn apply_repeatedly(
    db: &mut Session,
    topology: &Topology,
) -> Result<Result<Applied, Error>, sqlx::Error> {
    let mut tries = 1;
    loop {
        let topology = topology.clone();
        let result = db
            .with(|db| Box::pin(async move { apply(db, &topology).await }))
            .await;
        match result {
            Err(error)
                if matches!(trouble(&error), Trouble::Repeat | Trouble::Locked)
                    && tries < TRIES =>
            {
                tries += 1;
            }
            result => return result,
        }
    }
}

async fn apply(
    db: &mut PgConnection,
    topology: &Topology,
) -> Result<Result<Applied, Error>, sqlx::Error> {
    let mut tx = db
        .begin_with("BEGIN ISOLATION LEVEL READ COMMITTED")
        .await?;
    sqlx::query("-- one at a time\nSELECT FROM store FOR UPDATE")
        .execute(&mut *tx)
        .await?;
    let in_force = load(&mut tx).await?;
    let refused = if topology.version < in_force.version {
        Some(Ok(Applied::Older {
            in_force: in_force.version,
        }))
    } else if topology.version == in_force.version && *topology == in_force {
        Some(Ok(Applied::Unchanged))
    } else if topology.version == in_force.version {
        Some(Err(Error::TopologyVersionReused {
            version: topology.version,
        }))
    } else {
        remove_producers(&mut tx, topology, &in_force)
            .await?
            .map(Err)
    };
    if let Some(reply) = refused {
        tx.rollback().await?;
        return Ok(reply);
    }
    for (name, topic) in &topology.topics {
        upsert_topic(&mut tx, name, topic).await?;
    }
    for (name, producer) in &topology.producers {
        upsert_producer(&mut tx, name, producer).await?;
    }
    for (name, topic) in &topology.topics {
        set_topic_producers(&mut tx, name, topic).await?;
    }
    for name in in_force
        .subscriptions
        .keys()
        .filter(|name| !topology.subscriptions.contains_key(*name))
    {
        sqlx::query(
            "-- deactivate a subscription
             UPDATE subscription SET active = false, settled = false, changed_at = clock_timestamp()
              WHERE name = $1",
        )
        .bind(name)
        .execute(&mut *tx)
        .await?;
    }
    for (name, subscription) in &topology.subscriptions {
        upsert_subscription(&mut tx, name, subscription).await?;
    }
    for name in in_force
        .topics
        .keys()
        .filter(|name| !topology.topics.contains_key(*name))
    {
        sqlx::query("-- deactivate a topic\nUPDATE topic SET active = false WHERE name = $1")
            .bind(name)
            .execute(&mut *tx)
            .await?;
    }
    sqlx::query("-- the topology in force\nUPDATE store SET topology_version = $1")
        .bind(i64::try_from(topology.version).unwrap_or(i64::MAX))
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Ok(Applied::Changed))
}

async fn remove_producers(
    tx: &mut PgConnection,
    new: &Topology,
    old: &Topology,
) -> Result<Option<Error>, sqlx::Error> {
    for name in new.unasked_producers(old) {
        let prepared: i64 = sqlx::query_scalar(
            "-- undecided of a producer
             SELECT count(*) FROM message WHERE producer = $1 AND state = 'PREPARED'",
        )
        .bind(name)
        .fetch_one(&mut *tx)
        .await?;
        if prepared > 0 {
            return Ok(Some(Error::ProducerHasPrepared {
                producer: name.to_owned(),
                prepared: prepared.unsigned_abs(),
            }));
        }
        if !new.producers.contains_key(name) {
            sqlx::query(
                "-- deactivate a producer\nUPDATE producer SET active = false WHERE name = $1",
            )
            .bind(name)
            .execute(&mut *tx)
            .await?;
        }
    }
    Ok(None)
}

async fn upsert_producer(
    tx: &mut PgConnection,
    name: &str,
    producer: &Producer,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "-- upsert a producer
         INSERT INTO producer (name, status_endpoint, check_after_ms, active)
         VALUES ($1, $2, $3, true)
         ON CONFLICT (name) DO UPDATE SET status_endpoint = excluded.status_endpoint,
                                          check_after_ms = excluded.check_after_ms, active = true",
    )
    .bind(name)
    .bind(&producer.status_endpoint)
    .bind(i64::try_from(producer.checks.check_after.as_millis()).unwrap_or(i64::MAX))
    .execute(tx)
    .await?;
    Ok(())
}

async fn upsert_topic(tx: &mut PgConnection, name: &str, topic: &Topic) -> Result<(), sqlx::Error> {
    sqlx::query(
        "-- upsert a topic
         INSERT INTO topic (name, may_have_no_subscriber, active) VALUES ($1, $2, true)
         ON CONFLICT (name) DO UPDATE
            SET may_have_no_subscriber = excluded.may_have_no_subscriber, active = true",
    )
    .bind(name)
    .bind(topic.may_have_no_subscriber)
    .execute(tx)
    .await?;
    Ok(())
}

async fn set_topic_producers(
    tx: &mut PgConnection,
    name: &str,
    topic: &Topic,
) -> Result<(), sqlx::Error> {
    sqlx::query("-- who may produce\nDELETE FROM topic_producer WHERE topic = $1")
        .bind(name)
        .execute(&mut *tx)
        .await?;
    let producers: Vec<_> = topic.producers.iter().map(String::as_str).collect();
    sqlx::query(
        "-- may produce
         INSERT INTO topic_producer (topic, producer) SELECT $1, unnest($2::text[])",
    )
    .bind(name)
    .bind(producers)
    .execute(tx)
    .await?;
    Ok(())
}

/// A subscription that becomes active, or moves to another topic, begins a new life.
async fn upsert_subscription(
    tx: &mut PgConnection,
    name: &str,
    subscription: &Subscription,
) -> Result<(), sqlx::Error> {
    let policy =
        policy::to_json(subscription).map_err(|source| sqlx::Error::Encode(Box::new(source)))?;
    sqlx::query(
        "-- upsert a subscription
         INSERT INTO subscription AS old (name, topic, policy, active, changed_at, settled)
         VALUES ($1, $2, $3, true, clock_timestamp(), true)
         ON CONFLICT (name) DO UPDATE
            SET topic = excluded.topic, policy = excluded.policy, active = true,
                settled = old.settled AND old.active AND old.topic = excluded.topic,
                changed_at = CASE WHEN old.active AND old.topic = excluded.topic
                                  THEN old.changed_at ELSE excluded.changed_at END",
    )
    .bind(name)
    .bind(&subscription.topic)
    .bind(policy)
    .execute(tx)
    .await?;
    Ok(())
}

/// Skips what is open of an earlier life of a subscription, with why, until nothing is left.
pub(super) async fn skip_leftovers(db: &mut Session) -> Result<(), sqlx::Error> {
    let rows = db
        .fetch(
            "-- unsettled subscriptions
             SELECT name, changed_at < clock_timestamp() - $1::interval AS settles
               FROM subscription WHERE NOT settled ORDER BY name",
            |query| query.bind(span(SETTLED_AFTER)),
        )
        .await?;
    for row in &rows {
        let name: &str = get(row, "name")?;
        while skip_some(db, name).await? >= SKIP_ROWS {}
        if get(row, "settles")? {
            db.fetch(SETTLE, |query| {
                query.bind(name).bind(1_i64).bind(span(SETTLED_AFTER))
            })
            .await?;
        }
    }
    Ok(())
}

async fn skip_some(db: &mut Session, subscription: &str) -> Result<usize, sqlx::Error> {
    let rows = db
        .fetch(SKIP, |query| query.bind(subscription).bind(long(SKIP_ROWS)))
        .await?;
    Ok(rows.len())
}

/// Begins a statement: `open` are deliveries of an earlier life of subscription `$1`, at most `$2`.
macro_rules! leftovers {
    () => {
        "
    WITH s AS MATERIALIZED (
        SELECT name, topic, active, changed_at,
               'its subscription was removed by topology version '
               || (SELECT topology_version FROM store) AS why
          FROM subscription WHERE name = $1
    ), open AS MATERIALIZED (
        SELECT d.message_id FROM (
            SELECT message_id, confirmed_at FROM delivery
             WHERE subscription = $1 AND state = 'PENDING' AND stream_ends = 0
            UNION ALL
            SELECT message_id, confirmed_at FROM delivery
             WHERE subscription = $1 AND state = 'PENDING' AND stream_ends > 0
            UNION ALL
            SELECT message_id, confirmed_at FROM delivery
             WHERE subscription = $1 AND state = 'SENT'
            UNION ALL
            SELECT message_id, confirmed_at FROM delivery
             WHERE subscription = $1 AND state = 'DEAD'
        ) AS d, s
         WHERE NOT s.active OR d.confirmed_at < s.changed_at
            OR EXISTS (SELECT FROM message m
                        WHERE m.id = d.message_id AND m.topic <> s.topic)
         LIMIT $2
    )"
    };
}

/// What another process has locked is open still, so nothing is settled over it.
const SETTLE: &str = concat!(
    "-- settle a subscription",
    leftovers!(),
    "
    UPDATE subscription SET settled = true
     WHERE name = $1 AND changed_at < clock_timestamp() - $3::interval
       AND NOT EXISTS (SELECT FROM open)"
);

const SKIP: &str = concat!(
    "-- skip deliveries",
    leftovers!(),
    ", locked AS MATERIALIZED (
        SELECT d.message_id FROM open o
          JOIN delivery d ON d.message_id = o.message_id AND d.subscription = $1
         WHERE d.state IN ('PENDING', 'SENT', 'DEAD')
         ORDER BY d.message_id FOR UPDATE OF d /* waits */
    ), skipped AS (
        UPDATE delivery d
           SET state = 'SKIPPED', due_at = NULL, token = NULL, answered_at = clock_timestamp(),
               last_error = s.why
          FROM locked l, s WHERE d.message_id = l.message_id AND d.subscription = $1
        RETURNING d.message_id, d.answered_at, d.last_error
    ), events AS (
        INSERT INTO message_event (message_id, subscription, at, kind, detail)
        SELECT message_id, $1, answered_at, 'skipped', last_error FROM skipped
    )
    SELECT message_id FROM skipped"
);

/// The names of all that were removed.
pub(super) async fn removed_subscriptions(db: &mut Session) -> Result<Vec<String>, sqlx::Error> {
    let rows = db
        .fetch(
            "-- removed subscriptions
             SELECT name FROM subscription WHERE NOT active ORDER BY name",
            |query| query,
        )
        .await?;
    rows.iter().map(|row| get(row, "name")).collect()
}

/// Reads what is active.
pub(super) async fn load(db: &mut PgConnection) -> Result<Topology, sqlx::Error> {
    let version: i64 = sqlx::query_scalar("SELECT topology_version FROM store")
        .fetch_one(&mut *db)
        .await?;
    let mut topics = BTreeMap::new();
    for row in sqlx::query("SELECT name, may_have_no_subscriber FROM topic WHERE active")
        .fetch_all(&mut *db)
        .await?
    {
        let topic = Topic {
            producers: BTreeSet::new(),
            may_have_no_subscriber: get(&row, "may_have_no_subscriber")?,
        };
        topics.insert(get::<String>(&row, "name")?, topic);
    }
    for row in sqlx::query("SELECT topic, producer FROM topic_producer")
        .fetch_all(&mut *db)
        .await?
    {
        if let Some(topic) = topics.get_mut(get::<&str>(&row, "topic")?) {
            topic.producers.insert(get(&row, "producer")?);
        }
    }
    let mut producers = BTreeMap::new();
    for row in
        sqlx::query("SELECT name, status_endpoint, check_after_ms FROM producer WHERE active")
            .fetch_all(&mut *db)
            .await?
    {
        let check_after_ms: i64 = row.try_get("check_after_ms")?;
        let producer = Producer {
            status_endpoint: get(&row, "status_endpoint")?,
            checks: CheckPolicy {
                check_after: Duration::from_millis(check_after_ms.unsigned_abs()),
            },
        };
        producers.insert(get::<String>(&row, "name")?, producer);
    }
    let mut subscriptions = BTreeMap::new();
    for row in sqlx::query("SELECT name, topic, policy FROM subscription WHERE active")
        .fetch_all(&mut *db)
        .await?
    {
        let subscription = policy::from_json(get(&row, "topic")?, get(&row, "policy")?)
            .ok_or_else(|| wrong("policy", "cannot be read"))?;
        subscriptions.insert(get::<String>(&row, "name")?, subscription);
    }
    Ok(Topology {
        version: version.unsigned_abs(),
        producers,
        topics,
        subscriptions,
    })
}

/// The policy of a subscription, active or not; the default where there is no such
/// subscription, since then there is no delivery to apply it to.
pub(super) async fn policy(
    db: &mut Session,
    subscription: &str,
) -> Result<DeliveryPolicy, sqlx::Error> {
    let rows = db
        .fetch(
            "-- the policy\nSELECT policy FROM subscription WHERE name = $1",
            |query| query.bind(subscription),
        )
        .await?;
    let Some(row) = rows.first() else {
        return Ok(DeliveryPolicy::default());
    };
    policy::from_json(String::new(), get(row, "policy")?)
        .map(|subscription| subscription.policy)
        .ok_or_else(|| wrong("policy", "cannot be read"))
}
