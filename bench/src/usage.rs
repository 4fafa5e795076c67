//! What a run used of the machine: processor time, WAL, memory.

use std::fs;

use sqlx::Executor as _;
use sqlx::postgres::PgConnection;

use crate::Failure;
use crate::servers::Servers;

/// Of a second; Linux has counted processor time in hundredths for programs ever since.
const TICKS: f64 = 100.0;

/// What one message took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    /// Microseconds of all processors together, whoever used them.
    pub(crate) cpu_us: f64,
    pub(crate) wal_bytes: f64,
    /// Without full-page images, where that is known.
    pub(crate) wal_bytes_without_images: Option<f64>,
}

/// Counters at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    /// Seconds of all processors together, whoever used them.
    cpu_s: f64,
    /// The position in the WAL.
    wal: String,
}

impl Usage {
    /// Reads them.
    pub(crate) async fn now(servers: &Servers) -> Result<Self, Failure> {
        let mut db = servers.admin().await?;
        let wal = sqlx::query_scalar("SELECT pg_current_wal_flush_lsn()::text")
            .fetch_one(&mut db)
            .await
            .map_err(Failure::of("read how much WAL was written"))?;
        Ok(Self {
            cpu_s: cpu_s()?,
            wal,
        })
    }

    /// What was used from then until now, per message.
    pub(crate) async fn until_now(self, servers: &Servers, messages: u64) -> Result<Used, Failure> {
        let now = Self::now(servers).await?;
        let mut db = servers.admin().await?;
        let bytes = "SELECT pg_wal_lsn_diff($1::pg_lsn, $2::pg_lsn)::float8";
        let bytes: f64 = sqlx::query_scalar(bytes)
            .bind(&now.wal)
            .bind(&self.wal)
            .fetch_one(&mut db)
            .await
            .map_err(Failure::of("read how much WAL was written"))?;
        let images = full_page_images(&mut db, &self.wal, &now.wal).await;
        if let Err(error) = &images {
            eprintln!("full-page images are not told apart: {error}");
        }
        let per = |used: f64| used / messages as f64;
        Ok(Used {
            cpu_us: per((now.cpu_s - self.cpu_s) * 1e6),
            wal_bytes: per(bytes),
            wal_bytes_without_images: images.ok().map(|images| per(bytes - images)),
        })
    }
}

/// Bytes of full-page images between two positions. Nothing where the server cannot look into its
/// WAL, as before version 15, or does not have all of it any more.
async fn full_page_images(db: &mut PgConnection, from: &str, to: &str) -> Result<f64, sqlx::Error> {
    db.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
        .await?;
    let sql = "SELECT coalesce(sum(fpi_size), 0)::float8
                 FROM pg_get_wal_stats($1::pg_lsn, $2::pg_lsn, false)";
    let images = sqlx::query_scalar(sql).bind(from).bind(to);
    images.fetch_one(db).await
}

fn cpu_s() -> Result<f64, Failure> {
    let text =
        fs::read_to_string("/proc/stat").map_err(Failure::of("read the processors' time"))?;
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|ticks| ticks.parse().ok())
        .collect();
    // user, nice, system, then idle, iowait, irq, softirq, and the guests' share of user.
    let busy = |index: usize| ticks.get(index).copied().unwrap_or_default();
    Ok([0, 1, 2, 5, 6].into_iter().map(busy).sum::<f64>() / TICKS)
}

/// Processor time that a process has used, in seconds.
pub(crate) fn cpu_of(pid: u32) -> Result<f64, Failure> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_err(Failure::of("read how much time the service has used"))?;
    // Its name stands in brackets and may hold anything.
    let fields = text.rsplit_once(')').map(|(_, fields)| fields);
    let fields: Vec<&str> = fields.unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<f64>().ok())
    };
    let (user, system) = (ticks(11), ticks(12));
    let ticks = user.zip(system).map(|(user, system)| user + system);
    let ticks = ticks.ok_or_else(|| Failure(format!("process {pid} has no times")))?;
    Ok(ticks / TICKS)
}

/// The most memory that a process has had, in MiB.
pub(crate) fn peak_mib(pid: u32) -> Result<f64, Failure> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .map_err(Failure::of("read how much memory the service has had"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| {
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<f64>()
            .ok()
    });
    let kib = kib.ok_or_else(|| Failure(format!("process {pid} has no VmHWM")))?;
    Ok(kib / 1024.0)
}
