//! A database of a test's own on the PostgreSQL server that `HANDFAST_TEST_POSTGRES` names.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly, too")]

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _};

/// A new database; it goes when this is dropped, with everybody who is connected to it.
#[derive(Debug)]
pub struct Scratch {
    server: PgConnectOptions,
    name: String,
}

impl Scratch {
    /// Makes it. Panics if no server is named or it cannot be made.
    pub async fn create() -> Self {
        let Ok(url) = std::env::var("HANDFAST_TEST_POSTGRES") else {
            panic!("HANDFAST_TEST_POSTGRES is not set; run `cargo xtask test`, or name a server");
        };
        let server: PgConnectOptions = url.parse().unwrap();
        let name = format!("handfast_test_{}", uuid::Uuid::new_v4().simple());
        run(&server, format!("CREATE DATABASE {name}")).await;
        Self { server, name }
    }

    /// How to connect to it.
    pub fn options(&self) -> PgConnectOptions {
        self.server.clone().database(&self.name)
    }

    /// The same as text.
    pub fn url(&self) -> String {
        self.options().to_url_lossy().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        let server = self.server.clone();
        // A thread of its own, because a test's runtime cannot be waited for inside of it.
        let dropping = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(run(&server, sql));
        });
        // A test that has failed says more than what it leaves.
        let dropped = dropping.join();
        assert!(dropped.is_ok() || std::thread::panicking());
    }
}

async fn run(server: &PgConnectOptions, sql: String) {
    let mut connection = server.connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&mut connection)
        .await
        .unwrap();
}
