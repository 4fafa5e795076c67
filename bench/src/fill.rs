//! Messages that are in a store before anything is measured, loaded with COPY.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use handfast_service::clock::SystemClock;
use handfast_service::store::Store as _;
use handfast_service::store::postgres::{Address, PostgresStore};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;
use crate::place::Place;
use crate::topology::{self, PRODUCER, TOPIC, topology};

/// Rows of one COPY.
const CHUNK: u64 = 20_000;
/// Connections that load at the same time.
const LOADERS: u64 = 2;
/// What a stored message of 1 KiB takes, indexes and WAL included, generously.
const BYTES_PER_MESSAGE: u64 = 4_000;

/// What became of the messages that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Delivered and answered.
    Finished,
    /// Due, and not sent.
    Waiting,
}

/// Refuses where the disk behind this folder could not hold so many.
pub(crate) fn check_space(folder: Option<&Path>, messages: u64) -> Result<(), Failure> {
    let Some(folder) = folder else {
        return Ok(());
    };
    let df = Command::new("df")
        .args(["--output=avail", "--block-size=1"])
        .arg(folder)
        .output()
        .map_err(Failure::of("ask df how much is free"))?;
    let said = String::from_utf8_lossy(&df.stdout);
    let free = said
        .lines()
        .nth(1)
        .and_then(|line| line.trim().parse().ok());
    let free: u64 = free.ok_or_else(|| Failure(format!("df said {said:?}")))?;
    let needed = messages * BYTES_PER_MESSAGE;
    if free < needed {
        return Err(Failure(format!(
            "{messages} messages need {} GB free in {}, and {} GB are; store fewer",
            needed / 1_000_000_000,
            folder.display(),
            free / 1_000_000_000
        )));
    }
    Ok(())
}

/// Makes the service's schema and topology.
pub(crate) async fn schema(place: &Place, subscriptions: &[String]) -> Result<(), Failure> {
    let store = open(place).await?;
    let applied = store.apply_topology(topology(subscriptions)).await;
    applied.map_err(Failure::of("apply the topology"))?;
    store.close().await;
    Ok(())
}

/// The service's store, without a service.
pub(crate) async fn open(place: &Place) -> Result<PostgresStore, Failure> {
    let address: Address = place
        .store
        .parse()
        .map_err(Failure::of("read the URL of the store"))?;
    let store = PostgresStore::open(address, Arc::new(SystemClock::new()), 1).await;
    store.map_err(Failure::of("open the store"))
}

/// Loads so many messages for a subscription, with payloads of so many bytes.
pub(crate) async fn load(
    place: &Place,
    subscription: &str,
    kind: Kind,
    messages: u64,
    payload: usize,
) -> Result<(), Failure> {
    if messages == 0 {
        return Ok(());
    }
    eprintln!("loading {messages} messages for {subscription}");
    let mut db = connect(place).await?;
    let bucket = "SELECT min(number) FROM body_bucket WHERE NOT closed";
    let bucket: i64 = sqlx::query_scalar(bucket)
        .fetch_one(&mut db)
        .await
        .map_err(Failure::of("find the body bucket"))?;
    let mut loaders = JoinSet::new();
    for loader in 0..LOADERS {
        let (place, subscription) = (place.clone(), subscription.to_owned());
        loaders.spawn(async move {
            let mut db = connect(&place).await?;
            let mut first = loader * CHUNK;
            while first < messages {
                let rows = CHUNK.min(messages - first);
                let ids: Vec<Uuid> = (0..rows).map(|_| Uuid::now_v7()).collect();
                chunk(&mut db, &ids, bucket, &subscription, kind, payload).await?;
                if (first / CHUNK).is_multiple_of(50) && first > 0 {
                    eprintln!("{first} are there");
                }
                first += LOADERS * CHUNK;
            }
            Ok::<(), Failure>(())
        });
    }
    while let Some(done) = loaders.join_next().await {
        done.map_err(Failure::of("load"))??;
    }
    // As it would be long since in a store that has grown.
    for table in [
        "message".to_owned(),
        "delivery".to_owned(),
        format!("body_{bucket}"),
    ] {
        db.execute(AssertSqlSafe(format!("VACUUM (ANALYZE) {table}")))
            .await
            .map_err(Failure::of("vacuum"))?;
    }
    Ok(())
}

async fn chunk(
    db: &mut PgConnection,
    ids: &[Uuid],
    bucket: i64,
    subscription: &str,
    kind: Kind,
    payload: usize,
) -> Result<(), Failure> {
    let now = "now";
    let line = |id: &Uuid| {
        format!(
            "{id}\t{PRODUCER}\t{TOPIC}\tCONFIRMED\t\\\\x{}\t{bucket}\t{payload}\t{now}\t{now}\tPRODUCER\n",
            "00".repeat(32)
        )
    };
    copy(
        db,
        "message (id, producer, topic, state, content_hash, bucket, body_bytes, prepared_at, \
         decided_at, decided_by)",
        ids.iter().map(line).collect(),
    )
    .await?;
    // Letters are bytes as they stand; these hold 4 bits each.
    let body: String = topology::payload(payload)
        .iter()
        .map(|byte| char::from(b'a' + byte % 16))
        .collect();
    let line = |id: &Uuid| format!("{id}\t\t[]\t{body}\n");
    let table = format!("body_{bucket} (message_id, content_type, headers, payload)");
    copy(db, &table, ids.iter().map(line).collect()).await?;
    let line = |id: &Uuid| match kind {
        Kind::Finished => {
            format!("{id}\t{subscription}\tCONSUMED\t\\N\t1\t{now}\t{now}\t{now}\t{now}\n")
        }
        Kind::Waiting => {
            format!("{id}\t{subscription}\tPENDING\t{now}\t0\t{now}\t\\N\t\\N\t\\N\n")
        }
    };
    copy(
        db,
        "delivery (message_id, subscription, state, due_at, generation, confirmed_at, \
         first_sent_at, sent_at, answered_at)",
        ids.iter().map(line).collect(),
    )
    .await
}

async fn copy(db: &mut PgConnection, table: &str, lines: String) -> Result<(), Failure> {
    let failed = Failure::of::<sqlx::Error>("load messages");
    let sql = format!("COPY {table} FROM STDIN");
    let mut copy = db.copy_in_raw(&sql).await.map_err(&failed)?;
    copy.send(lines.into_bytes()).await.map_err(&failed)?;
    copy.finish().await.map_err(&failed)?;
    Ok(())
}

/// A connection to the service's database.
pub(crate) async fn connect(place: &Place) -> Result<PgConnection, Failure> {
    let db = PgConnection::connect(&place.store).await;
    db.map_err(Failure::of("connect to the store"))
}
