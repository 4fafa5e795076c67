//! The topology in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;

use super::rows::{Columns, error};
use super::writer::{Kind, Tx};
use crate::message::{CheckPolicy, DeliveryPolicy};
use crate::store::{Applied, Error, policy};
use crate::topology::{Producer, Subscription, Topic, Topology};

pub(super) async fn apply(tx: &mut Tx, (topology,): &(Topology,)) -> Result<Applied, Error> {
    let doing = Kind::Topology.doing();
    let in_force = load(&mut tx.db).await?;
    if topology.version < in_force.version {
        return Ok(Applied::Older {
            in_force: in_force.version,
        });
    }
    if topology.version == in_force.version {
        if *topology == in_force {
            return Ok(Applied::Unchanged);
        }
        return Err(Error::TopologyVersionReused {
            version: topology.version,
        });
    }
    remove_producers(tx, topology, &in_force).await?;
    for (name, topic) in &topology.topics {
        upsert_topic(tx, name, topic).await?;
    }
    for (name, producer) in &topology.producers {
        upsert_producer(tx, name, producer).await?;
    }
    for (name, topic) in &topology.topics {
        set_topic_producers(tx, name, topic).await?;
    }
    for (name, old) in &in_force.subscriptions {
        let moved_or_gone = topology
            .subscriptions
            .get(name)
            .is_none_or(|new| new.topic != old.topic);
        if moved_or_gone {
            remove_subscription(tx, name, topology.version).await?;
        }
    }
    for (name, subscription) in &topology.subscriptions {
        upsert_subscription(tx, name, subscription).await?;
    }
    for name in in_force
        .topics
        .keys()
        .filter(|name| !topology.topics.contains_key(*name))
    {
        sqlx::query("-- deactivate a topic\nUPDATE topic SET active = 0 WHERE name = ?")
            .bind(name)
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
    }
    sqlx::query("-- the topology in force\nUPDATE store SET topology_version = ?")
        .bind(i64::try_from(topology.version).unwrap_or(i64::MAX))
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    Ok(Applied::Changed)
}

async fn remove_producers(tx: &mut Tx, new: &Topology, old: &Topology) -> Result<(), Error> {
    let doing = Kind::Topology.doing();
    for name in new.unasked_producers(old) {
        let prepared: i64 = sqlx::query_scalar(
            "-- undecided of a producer
             SELECT count(*) FROM message WHERE producer = ? AND state = 'PREPARED'",
        )
        .bind(name)
        .fetch_one(&mut tx.db)
        .await
        .map_err(error(doing))?;
        if prepared > 0 {
            return Err(Error::ProducerHasPrepared {
                producer: name.to_owned(),
                prepared: prepared.unsigned_abs(),
            });
        }
        if !new.producers.contains_key(name) {
            sqlx::query("-- deactivate a producer\nUPDATE producer SET active = 0 WHERE name = ?")
                .bind(name)
                .execute(&mut tx.db)
                .await
                .map_err(error(doing))?;
        }
    }
    Ok(())
}

/// First inactive, so that no confirm adds to it; then what is open is SKIPPED, with why.
async fn remove_subscription(tx: &mut Tx, name: &str, version: u64) -> Result<(), Error> {
    let doing = Kind::Topology.doing();
    let why = format!("its subscription was removed by topology version {version}");
    let now = tx.now.as_micros();
    sqlx::query("-- deactivate a subscription\nUPDATE subscription SET active = 0 WHERE name = ?")
        .bind(name)
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    sqlx::query(
        "-- say why deliveries are skipped
         INSERT INTO message_event (message_id, subscription, at, kind, detail)
         SELECT message_id, subscription, ?, 'skipped', ? FROM delivery
          WHERE subscription = ? AND state IN ('PENDING', 'SENT', 'DEAD')",
    )
    .bind(now)
    .bind(&why)
    .bind(name)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    sqlx::query(
        "-- skip deliveries
         UPDATE delivery
            SET state = 'SKIPPED', due_at = NULL, token = NULL, answered_at = ?, last_error = ?
          WHERE subscription = ? AND state IN ('PENDING', 'SENT', 'DEAD')",
    )
    .bind(now)
    .bind(&why)
    .bind(name)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}

async fn upsert_producer(tx: &mut Tx, name: &str, producer: &Producer) -> Result<(), Error> {
    sqlx::query(
        "-- upsert a producer
         INSERT INTO producer (name, status_endpoint, check_after_ms, active) VALUES (?, ?, ?, 1)
         ON CONFLICT (name) DO UPDATE SET status_endpoint = excluded.status_endpoint,
                                          check_after_ms = excluded.check_after_ms, active = 1",
    )
    .bind(name)
    .bind(&producer.status_endpoint)
    .bind(millis(producer.checks.check_after))
    .execute(&mut tx.db)
    .await
    .map_err(error(Kind::Topology.doing()))?;
    Ok(())
}

async fn upsert_topic(tx: &mut Tx, name: &str, topic: &Topic) -> Result<(), Error> {
    sqlx::query(
        "-- upsert a topic
         INSERT INTO topic (name, may_have_no_subscriber, active) VALUES (?, ?, 1)
         ON CONFLICT (name) DO UPDATE
            SET may_have_no_subscriber = excluded.may_have_no_subscriber, active = 1",
    )
    .bind(name)
    .bind(topic.may_have_no_subscriber)
    .execute(&mut tx.db)
    .await
    .map_err(error(Kind::Topology.doing()))?;
    Ok(())
}

async fn set_topic_producers(tx: &mut Tx, name: &str, topic: &Topic) -> Result<(), Error> {
    let doing = Kind::Topology.doing();
    sqlx::query("-- who may produce\nDELETE FROM topic_producer WHERE topic = ?")
        .bind(name)
        .execute(&mut tx.db)
        .await
        .map_err(error(doing))?;
    for producer in &topic.producers {
        sqlx::query("-- may produce\nINSERT INTO topic_producer (topic, producer) VALUES (?, ?)")
            .bind(name)
            .bind(producer)
            .execute(&mut tx.db)
            .await
            .map_err(error(doing))?;
    }
    Ok(())
}

async fn upsert_subscription(
    tx: &mut Tx,
    name: &str,
    subscription: &Subscription,
) -> Result<(), Error> {
    let doing = Kind::Topology.doing();
    let policy = policy::to_json(subscription).map_err(|cause| Error::Inconsistent {
        doing,
        what: format!("policy of {name}: {cause}"),
    })?;
    sqlx::query(
        "-- upsert a subscription
         INSERT INTO subscription (name, topic, policy, active) VALUES (?, ?, ?, 1)
         ON CONFLICT (name) DO UPDATE
            SET topic = excluded.topic, policy = excluded.policy, active = 1",
    )
    .bind(name)
    .bind(&subscription.topic)
    .bind(policy)
    .execute(&mut tx.db)
    .await
    .map_err(error(doing))?;
    Ok(())
}

/// The names of all that were removed.
pub(super) async fn removed_subscriptions(db: &mut SqliteConnection) -> Result<Vec<String>, Error> {
    sqlx::query_scalar(
        "-- removed subscriptions\nSELECT name FROM subscription WHERE active = 0 ORDER BY name",
    )
    .fetch_all(db)
    .await
    .map_err(error("read removed subscriptions"))
}

/// The version of the topology in force.
pub(super) async fn version(db: &mut SqliteConnection) -> Result<u64, Error> {
    let version: i64 = sqlx::query_scalar("SELECT topology_version FROM store")
        .fetch_one(db)
        .await
        .map_err(error("read the version of the topology"))?;
    Ok(version.unsigned_abs())
}

/// Reads what is active.
pub(super) async fn load(db: &mut SqliteConnection) -> Result<Topology, Error> {
    let doing = "read the topology";
    let version: i64 = sqlx::query_scalar("SELECT topology_version FROM store")
        .fetch_one(&mut *db)
        .await
        .map_err(error(doing))?;
    let mut topics = BTreeMap::new();
    for row in sqlx::query("SELECT name, may_have_no_subscriber FROM topic WHERE active = 1")
        .fetch_all(&mut *db)
        .await
        .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        let topic = Topic {
            producers: BTreeSet::new(),
            may_have_no_subscriber: columns.get("may_have_no_subscriber")?,
        };
        topics.insert(columns.get::<String>("name")?, topic);
    }
    for row in sqlx::query("SELECT topic, producer FROM topic_producer")
        .fetch_all(&mut *db)
        .await
        .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        if let Some(topic) = topics.get_mut(columns.get::<&str>("topic")?) {
            topic.producers.insert(columns.get("producer")?);
        }
    }
    let mut producers = BTreeMap::new();
    for row in
        sqlx::query("SELECT name, status_endpoint, check_after_ms FROM producer WHERE active = 1")
            .fetch_all(&mut *db)
            .await
            .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        let producer = Producer {
            status_endpoint: columns.get("status_endpoint")?,
            checks: CheckPolicy {
                check_after: Duration::from_millis(columns.count("check_after_ms")?.into()),
            },
        };
        producers.insert(columns.get::<String>("name")?, producer);
    }
    let mut subscriptions = BTreeMap::new();
    for row in sqlx::query("SELECT name, topic, policy FROM subscription WHERE active = 1")
        .fetch_all(&mut *db)
        .await
        .map_err(error(doing))?
    {
        let columns = Columns::new(&row, doing);
        let subscription = policy::from_json(columns.get("topic")?, columns.get("policy")?)
            .ok_or_else(|| columns.wrong("policy", "cannot be read"))?;
        subscriptions.insert(columns.get::<String>("name")?, subscription);
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
    db: &mut SqliteConnection,
    subscription: &str,
    doing: &'static str,
) -> Result<DeliveryPolicy, Error> {
    let row = sqlx::query("-- the policy\nSELECT policy FROM subscription WHERE name = ?")
        .bind(subscription)
        .fetch_optional(db)
        .await
        .map_err(error(doing))?;
    let Some(row) = row else {
        return Ok(DeliveryPolicy::default());
    };
    let text: &str = row.try_get("policy").map_err(error(doing))?;
    policy::from_json(String::new(), text)
        .map(|subscription| subscription.policy)
        .ok_or_else(|| Columns::new(&row, doing).wrong("policy", "cannot be read"))
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
