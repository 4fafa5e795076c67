//! Forgets what is older than the inbox's retention, in small slices.

use std::io;
use std::time::Duration;

use sqlx::Pool;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::InboxDatabase;
use super::held::Held;

/// How often the pass runs.
const PERIOD: Duration = Duration::from_secs(3600);
/// How long after the first reading of the database's clock the second is taken. Short, so that
/// a process that is often started again prunes, too.
const SECOND_READING: Duration = Duration::from_secs(60);
/// How many rows one transaction removes, so that a handler never waits long behind it.
const SLICE_ROWS: u32 = 1_000;
/// How long one statement is waited for before its connection is given up.
const STATEMENT_WAIT: Duration = Duration::from_secs(30);
/// How far the database's clock may have drifted from ours between two readings.
const DRIFT: Duration = Duration::from_secs(60);

/// Prunes the inbox of one subscription.
pub(crate) struct Pruner<D: InboxDatabase> {
    pool: Pool<D>,
    subscription: String,
    retention: Duration,
    statement_wait: Duration,
    /// The last reading of the database's clock, and when it was taken by ours.
    last: Option<(i64, Instant)>,
}

impl<D: InboxDatabase> Pruner<D> {
    pub(crate) fn new(pool: Pool<D>, subscription: String, retention: Duration) -> Self {
        Self {
            pool,
            subscription,
            retention,
            statement_wait: STATEMENT_WAIT,
            last: None,
        }
    }

    /// Prunes a minute after the start and then every hour, until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let next = match self.last {
                None => SECOND_READING,
                Some(_) => PERIOD,
            };
            let pruned = self.once(&stop).await;
            let subscription = &self.subscription;
            match pruned {
                Ok(0) => {}
                Ok(rows) => tracing::debug!(subscription, rows, "forgot old inbox rows"),
                Err(error) => tracing::warn!(subscription, %error, "cannot prune the inbox"),
            }
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn once(&mut self, stop: &CancellationToken) -> Result<u64, sqlx::Error> {
        let mut held = Held::acquire(&self.pool).await?;
        let now = self.answered(D::now(&mut held.connection)).await?;
        let mut rows = 0;
        if self.trusts(now) {
            let before = now.saturating_sub(micros(self.retention));
            while !stop.is_cancelled() {
                let slice = D::prune(&mut held.connection, &self.subscription, before, SLICE_ROWS);
                let slice = self.answered(slice).await?;
                rows += slice;
                if slice < u64::from(SLICE_ROWS) {
                    break;
                }
                // Between two slices a handler gets its turn.
                tokio::task::yield_now().await;
            }
        }
        held.clean = true;
        Ok(rows)
    }

    /// Takes a reading of the database's clock. One reading says nothing, because a host may
    /// have started with any date; two say whether the clock runs as ours does.
    fn trusts(&mut self, now: i64) -> bool {
        let at = Instant::now();
        let Some((then, since)) = self.last.replace((now, at)) else {
            return false;
        };
        let trusted = moved_alike(now - then, at - since);
        if !trusted {
            tracing::warn!(
                subscription = self.subscription,
                "the database's clock jumped; the inbox is not pruned for an hour"
            );
        }
        trusted
    }

    /// What a statement says, unless a database that has gone away silently says nothing.
    async fn answered<T>(
        &self,
        statement: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        match timeout(self.statement_wait, statement).await {
            Ok(answer) => answer,
            Err(_) => Err(sqlx::Error::Io(io::ErrorKind::TimedOut.into())),
        }
    }
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
    use handfast_scratch::Scratch;
    use sqlx::SqlitePool;
    use sqlx::postgres::PgPoolOptions;
    use tempfile::TempDir;

    use super::*;

    const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

    #[tokio::test]
    async fn only_old_rows_of_the_subscription_are_forgotten() {
        let dir = TempDir::new().unwrap();
        let pool = file(&dir).await;
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
        let mut pruner = Pruner::new(pool.clone(), "points".to_owned(), WEEK);
        let first = pruner.once(&stop).await.unwrap();
        assert_eq!(first, 0, "one reading of a clock is no reason to forget");
        assert_eq!(pruner.once(&stop).await.unwrap(), 2_500 - 7 * 24);
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
        assert_eq!(pruner.once(&stop).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_clock_that_came_back_from_the_future_has_cost_nothing() {
        let dir = TempDir::new().unwrap();
        let pool = file(&dir).await;
        let stop = CancellationToken::new();
        let mut pruner = Pruner::new(pool, "points".to_owned(), WEEK);
        let now = {
            let mut connection = pruner.pool.acquire().await.unwrap();
            sqlx::Sqlite::now(&mut connection).await.unwrap()
        };
        // What a process reads first on a host that has started ten years ahead.
        assert!(!pruner.trusts(now + 520 * micros(WEEK)));
        assert!(!pruner.trusts(now));
        assert!(pruner.trusts(now));
        assert_eq!(pruner.once(&stop).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_database_that_says_nothing_is_given_up_and_asked_again() {
        let scratch = Scratch::create().await;
        let one = PgPoolOptions::new().max_connections(1);
        let pool = one.connect_with(scratch.options()).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        let stop = CancellationToken::new();
        let mut pruner = Pruner::new(pool, "points".to_owned(), WEEK);
        pruner.statement_wait = Duration::from_millis(100);
        assert_eq!(pruner.once(&stop).await.unwrap(), 0);

        let other = sqlx::PgPool::connect_with(scratch.options()).await.unwrap();
        let mut lock = other.begin().await.unwrap();
        sqlx::query("LOCK TABLE handfast_inbox IN ACCESS EXCLUSIVE MODE")
            .execute(&mut *lock)
            .await
            .unwrap();
        let error = pruner.once(&stop).await.unwrap_err();
        assert!(matches!(error, sqlx::Error::Io(_)), "{error}");
        {
            // The pool's only connection would still wait for the lock if it had been kept.
            let mut connection = pruner.pool.acquire().await.unwrap();
            let now = sqlx::Postgres::now(&mut connection);
            timeout(STATEMENT_WAIT, now).await.unwrap().unwrap();
        }
        lock.rollback().await.unwrap();
        pruner.statement_wait = STATEMENT_WAIT;
        assert_eq!(pruner.once(&stop).await.unwrap(), 0);
    }

    async fn file(dir: &TempDir) -> SqlitePool {
        let file = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(dir.path().join("inbox.db"))
            .create_if_missing(true);
        let pool = SqlitePool::connect_with(file).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        pool
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
