//! What a run used of the machine: processor time, WAL, memory.

use std::fs;

use serde_json::{Value, json};
use sqlx::Row as _;

use crate::Failure;
use crate::servers::Servers;

/// Of a second; Linux has counted processor time in hundredths for programs ever since.
const TICKS: f64 = 100.0;

/// Counters at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Seconds of all processors together, whoever used them.
    cpu_s: f64,
    wal_bytes: f64,
    full_page_images: i64,
}

impl Usage {
    /// Reads them.
    pub(crate) async fn now(servers: &Servers) -> Result<Self, Failure> {
        let mut db = servers.admin().await?;
        // The position is exact; processes report their images with up to a second's delay.
        let sql = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8 AS bytes, wal_fpi
                     FROM pg_stat_wal";
        let row = sqlx::query(sql)
            .fetch_one(&mut db)
            .await
            .map_err(Failure::of("read how much WAL was written"))?;
        let read = Failure::of::<sqlx::Error>("read how much WAL was written");
        Ok(Self {
            cpu_s: cpu_s()?,
            wal_bytes: row.try_get("bytes").map_err(&read)?,
            full_page_images: row.try_get("wal_fpi").map_err(&read)?,
        })
    }

    /// What was used since then, per message.
    pub(crate) fn since(self, before: Self, messages: u64) -> Value {
        let per = |used: f64| used / messages as f64;
        json!({
            "cpu_us_per_message": per((self.cpu_s - before.cpu_s) * 1e6),
            "wal_bytes_per_message": per(self.wal_bytes - before.wal_bytes),
            "full_page_images": self.full_page_images - before.full_page_images,
        })
    }
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
