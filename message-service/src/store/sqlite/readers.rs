//! Reading beside the writer.
//!
//! A reader sees one moment of the database and keeps SQLite from reusing the log behind it,
//! so a statement that runs longer than [`LONGEST`] is interrupted. Readers cannot write.

use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqlitePoolOptions};

use super::rows::error;
use crate::store::Error;

/// How many readers there are at a time.
const READERS: u32 = 4;
/// How long one read may take.
const LONGEST: Duration = Duration::from_secs(1);
/// How long a read waits for a free reader.
const PATIENCE: Duration = Duration::from_secs(2);
/// SQLite asks whether to go on each time it has done this many steps.
const STEPS_BETWEEN_LOOKS: i32 = 10_000;

pub(super) struct Readers {
    pool: SqlitePool,
}

impl Readers {
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        let pool = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(PATIENCE)
            .connect_lazy_with(options.pragma("query_only", "on"));
        Self { pool }
    }

    /// Runs a read in a task of its own, so that a caller who goes away leaves no reader
    /// half-way.
    pub(super) async fn read<T, F>(&self, doing: &'static str, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, Error>>
            + Send
            + 'static,
    {
        let pool = self.pool.clone();
        let task = tokio::spawn(async move {
            let unavailable = |source| Error::Unavailable { doing, source };
            let mut db = pool.acquire().await.map_err(unavailable)?;
            let began = Instant::now();
            db.lock_handle()
                .await
                .map_err(unavailable)?
                .set_progress_handler(STEPS_BETWEEN_LOOKS, move || began.elapsed() < LONGEST);
            let result = read(&mut db).await;
            db.lock_handle()
                .await
                .map_err(unavailable)?
                .remove_progress_handler();
            result
        });
        match task.await {
            Ok(result) => result,
            // Only a panic in the read itself comes here, since nobody aborts the task.
            Err(gone) => Err(error(doing)(sqlx::Error::Io(std::io::Error::other(gone)))),
        }
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
    }
}
