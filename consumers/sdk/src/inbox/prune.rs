//! Forgets what is older than the inbox's retention, in small slices.

use std::time::Duration;

use sqlx::Pool;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::InboxDatabase;

/// How often the pass runs.
const PERIOD: Duration = Duration::from_secs(3600);
/// How many rows one transaction removes, so that a handler never waits long behind it.
const SLICE_ROWS: u32 = 1_000;
/// How far the database's clock may have drifted from ours in one period.
const DRIFT: Duration = Duration::from_secs(60);

/// Prunes every hour until `stop`.
pub(crate) async fn run<D: InboxDatabase>(
    pool: Pool<D>,
    subscription: String,
    retention: Duration,
    stop: CancellationToken,
) {
    let mut last: Option<(i64, Instant)> = None;
    loop {
        match once::<D>(&pool, &subscription, retention, &mut last, &stop).await {
            Ok(0) => {}
            Ok(rows) => tracing::debug!(subscription, rows, "forgot old inbox rows"),
            Err(error) => tracing::warn!(subscription, %error, "cannot prune the inbox"),
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn once<D: InboxDatabase>(
    pool: &Pool<D>,
    subscription: &str,
    retention: Duration,
    last: &mut Option<(i64, Instant)>,
    stop: &CancellationToken,
) -> Result<u64, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    let now = D::now(&mut connection).await?;
    let at = Instant::now();
    let before = last.replace((now, at));
    if let Some((then, since)) = before
        && !moved_alike(now - then, at - since)
    {
        tracing::warn!(
            subscription,
            "the database's clock jumped; the inbox is not pruned for an hour"
        );
        return Ok(0);
    }
    let horizon = now.saturating_sub(micros(retention));
    let mut rows = 0;
    while !stop.is_cancelled() {
        let slice = D::prune(&mut connection, subscription, horizon, SLICE_ROWS).await?;
        rows += slice;
        if slice < u64::from(SLICE_ROWS) {
            break;
        }
        // Between two slices a handler gets its turn.
        tokio::task::yield_now().await;
    }
    Ok(rows)
}

/// Whether a database's clock went on by what ours did. One that jumped ahead would make the
/// inbox forget what is not old.
fn moved_alike(database_us: i64, ours: Duration) -> bool {
    (database_us - micros(ours)).unsigned_abs() <= DRIFT.as_micros() as u64
}

/// Microseconds as databases count them.
pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_old_rows_of_the_subscription_are_forgotten() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(dir.path().join("inbox.db"))
            .create_if_missing(true);
        let pool = sqlx::SqlitePool::connect_with(file).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        // 2,500 rows of each subscription, one an hour, half an hour off any limit.
        sqlx::query(
            "WITH RECURSIVE hour (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM hour WHERE n < 2499)
             INSERT INTO handfast_inbox (subscription, message_id, at)
             SELECT subscription, randomblob(16), (unixepoch() - n * 3600 - 1800) * 1000000
               FROM hour, (SELECT 'points' AS subscription UNION SELECT 'accounting')",
        )
        .execute(&pool)
        .await
        .unwrap();
        let stop = CancellationToken::new();
        let week = Duration::from_secs(7 * 24 * 3600);
        let mut last = None;
        let rows = once(&pool, "points", week, &mut last, &stop).await.unwrap();
        assert_eq!(rows, 2_500 - 7 * 24);
        let left: Vec<(String, i64)> = sqlx::query_as(
            "SELECT subscription, count(*) FROM handfast_inbox GROUP BY 1 ORDER BY 1",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        let expected = [
            ("accounting".to_owned(), 2_500),
            ("points".to_owned(), 7 * 24),
        ];
        assert_eq!(left, expected);
        assert_eq!(
            once(&pool, "points", week, &mut last, &stop).await.unwrap(),
            0
        );
    }

    #[test]
    fn a_clock_that_jumped_does_not_prune() {
        let hour = Duration::from_secs(3600);
        assert!(moved_alike(micros(hour), hour));
        assert!(moved_alike(micros(hour) + 59_000_000, hour));
        assert!(!moved_alike(micros(hour) + 61_000_000, hour));
        assert!(!moved_alike(-1, hour));
        assert!(!moved_alike(86_400_000_000, hour));
    }
}
