//! The statements of the document do what it says they do.

use sqlx::postgres::PgConnection;
use sqlx::{Acquire as _, AssertSqlSafe, Connection as _, Row as _, SqliteConnection};
use uuid::Uuid;

use crate::scratch::Database;

const DOCUMENT: &str = include_str!("../../../docs/guide/wire.md");

/// The code blocks of one language, in their order, without indentation.
pub(crate) fn blocks(language: &str) -> Vec<String> {
    // Between two fences lies a block: the language, and on the next lines the code.
    let blocks = DOCUMENT.split("```").skip(1).step_by(2);
    blocks
        .filter_map(|block| {
            let (begins, code) = block.split_once('\n')?;
            let lines: Vec<_> = code.lines().map(str::trim_start).collect();
            (begins == language).then(|| lines.join("\n"))
        })
        .collect()
}

/// The one PostgreSQL block with these words.
pub(crate) fn block(words: &str) -> String {
    let mut found = blocks("sql")
        .into_iter()
        .filter(|block| block.contains(words));
    let block = found
        .next()
        .unwrap_or_else(|| panic!("no block has `{words}`"));
    assert_eq!(found.next(), None, "two blocks have `{words}`");
    block
}

/// The tables of fence and inbox, as the document has them.
pub(crate) fn schemas() -> (String, String) {
    (
        block("CREATE TABLE handfast_fence ("),
        block("CREATE TABLE handfast_inbox ("),
    )
}

/// A statement without comments, on one line.
fn plain(sql: &str) -> String {
    let lines = sql
        .lines()
        .map(|line| line.split("--").next().unwrap_or_default());
    let words = lines.flat_map(str::split_whitespace);
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn its_tables_are_those_of_the_migrations() {
    let (fence, inbox) = schemas();
    let migrations = [
        (
            fence,
            include_str!("../../../migrations/fence/postgres/0001_fence.sql"),
        ),
        (
            inbox,
            include_str!("../../../migrations/inbox/postgres/0001_inbox.sql"),
        ),
    ];
    for (written, migration) in migrations {
        assert_eq!(plain(&written), plain(migration));
    }
}

/// Runs a block with its parameters, statement by statement, and returns the last row that a
/// statement returned and the rows that the last one of them changed.
async fn run(
    connection: &mut PgConnection,
    block: &str,
    parameters: &[String],
) -> (Option<sqlx::postgres::PgRow>, u64) {
    let mut last = (None, 0);
    for statement in block.split(';').map(str::trim).filter(|s| !s.is_empty()) {
        let mut statement = statement.to_owned();
        for (index, parameter) in parameters.iter().enumerate() {
            statement = statement.replace(&format!("${}", index + 1), parameter);
        }
        if statement.contains("RETURNING") || statement.starts_with("SELECT") {
            let row = sqlx::raw_sql(AssertSqlSafe(statement))
                .fetch_optional(&mut *connection)
                .await;
            last.0 = row.unwrap();
        } else {
            let inserts = statement.starts_with("INSERT") || statement.starts_with("DELETE");
            let done = sqlx::raw_sql(AssertSqlSafe(statement))
                .execute(&mut *connection)
                .await;
            if inserts {
                last.1 = done.unwrap().rows_affected();
            } else {
                done.unwrap();
            }
        }
    }
    last
}

fn literal(id: Uuid) -> String {
    format!("'{id}'")
}

#[tokio::test]
async fn its_inbox_statement_tells_a_repeat_from_a_new_message() {
    let database = Database::with(&schemas().1).await;
    let mut connection = database.pool.acquire().await.unwrap();
    let parameters = ["'accounting'".to_owned(), literal(Uuid::now_v7())];
    let begin = block("RETURNING seen");
    for expected in [1, 2, 3] {
        let (row, _) = run(&mut connection, &begin, &parameters).await;
        assert_eq!(row.unwrap().get::<i64, _>("seen"), expected);
        run(&mut connection, "COMMIT", &[]).await;
    }
    // What is rolled back was never seen.
    let other = ["'accounting'".to_owned(), literal(Uuid::now_v7())];
    for _ in 0..2 {
        let (row, _) = run(&mut connection, &begin, &other).await;
        assert_eq!(row.unwrap().get::<i64, _>("seen"), 1);
        run(&mut connection, "ROLLBACK", &[]).await;
    }

    let prune = block("DELETE FROM handfast_inbox");
    assert_eq!(run(&mut connection, &prune, &parameters).await.1, 0);
    let old = "UPDATE handfast_inbox SET at = at - interval '8 days'";
    run(&mut connection, old, &[]).await;
    assert_eq!(run(&mut connection, &prune, &parameters).await.1, 1);
}

#[tokio::test]
async fn its_fence_statements_let_one_win_for_ever() {
    let database = Database::with(&schemas().0).await;
    let mut business = database.pool.acquire().await.unwrap();
    let mut check = database.pool.acquire().await.unwrap();
    let begin = block("'COMMITTED')\nON CONFLICT");
    let ask = block("'ROLLED_BACK')\nON CONFLICT");
    let verdict = |row: Option<sqlx::postgres::PgRow>| row.unwrap().get::<String, _>("verdict");

    let first = [literal(Uuid::now_v7())];
    assert_eq!(run(&mut business, &begin, &first).await.1, 1);
    let busy = async |check: &mut PgConnection, id: &str| {
        let asked = ask.replace("$1", id);
        let refused = sqlx::raw_sql(AssertSqlSafe(asked))
            .execute(&mut *check)
            .await
            .unwrap_err();
        run(check, "ROLLBACK", &[]).await;
        refused
            .as_database_error()
            .unwrap()
            .code()
            .unwrap()
            .into_owned()
    };
    assert_eq!(
        busy(&mut check, &first[0]).await,
        "55P03",
        "the business holds the row"
    );
    run(&mut business, "COMMIT", &[]).await;
    assert_eq!(verdict(run(&mut check, &ask, &first).await.0), "COMMITTED");

    let second = [literal(Uuid::now_v7())];
    for _ in 0..2 {
        assert_eq!(
            verdict(run(&mut check, &ask, &second).await.0),
            "ROLLED_BACK"
        );
    }
    assert_eq!(
        run(&mut business, &begin, &second).await.1,
        0,
        "the check was faster"
    );
    run(&mut business, "ROLLBACK", &[]).await;

    let identity = run(&mut check, &block("SELECT identity"), &[]).await.0;
    assert!(!identity.unwrap().get::<Uuid, _>("identity").is_nil());
    let old = "UPDATE handfast_fence SET at = at - interval '31 days'";
    run(&mut check, old, &[]).await;
    let prune = block("DELETE FROM handfast_fence");
    assert_eq!(run(&mut check, &prune, &[]).await.1, 2);
}

#[tokio::test]
async fn its_inbox_statement_for_sqlite_does_the_same() {
    let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    let connection = connection.acquire().await.unwrap();
    let schema = include_str!("../../../migrations/inbox/sqlite/0001_inbox.sql");
    sqlx::raw_sql(schema)
        .execute(&mut *connection)
        .await
        .unwrap();
    let [statement] = &blocks("sqlite")[..] else {
        panic!("there is one block for SQLite");
    };
    let id = Uuid::now_v7();
    for expected in [1_i64, 2] {
        let seen: i64 = sqlx::query_scalar(AssertSqlSafe(statement.clone()))
            .bind("accounting")
            .bind(&id.as_bytes()[..])
            .bind(1_764_035_162_123_456_i64)
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        assert_eq!(seen, expected);
    }
}
