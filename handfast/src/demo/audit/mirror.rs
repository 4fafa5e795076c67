//! What four databases on a server say, copied into one in memory, so that the same statements
//! audit both pairs of engines: PostgreSQL cannot join across databases.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Row as _};

use super::Engines;
use super::Role;

/// How a column is carried over.
#[derive(Clone, Copy)]
enum Kind {
    /// A UUID, kept as its bytes.
    Id,
    Number,
    Text,
    Flag,
}

use Kind::{Flag, Id, Number, Text};

/// Whose, which, and its columns.
type Table = (Role, &'static str, &'static [(&'static str, Kind)]);

/// Which columns of which tables the audit reads.
const TABLES: [Table; 10] = [
    (
        Role::Service,
        "message",
        &[
            ("id", Id),
            ("key", Text),
            ("state", Text),
            ("decided_by", Text),
            ("conflict", Flag),
        ],
    ),
    (
        Role::Service,
        "delivery",
        &[
            ("message_id", Id),
            ("subscription", Text),
            ("state", Text),
            ("last_error", Text),
        ],
    ),
    (
        Role::Payment,
        "payment",
        &[("caller", Text), ("order_id", Text), ("state", Text)],
    ),
    (Role::Payment, "pay_try", &[("try_id", Id)]),
    (
        Role::Payment,
        "pay_done",
        &[
            ("try_id", Id),
            ("message_id", Id),
            ("caller", Text),
            ("order_id", Text),
        ],
    ),
    (
        Role::Payment,
        "account",
        &[("name", Text), ("balance", Number)],
    ),
    (
        Role::Accounting,
        "voucher",
        &[
            ("id", Number),
            ("message_id", Id),
            ("caller", Text),
            ("order_id", Text),
        ],
    ),
    (
        Role::Accounting,
        "voucher_line",
        &[("voucher", Number), ("amount", Number)],
    ),
    (Role::Accounting, "handfast_inbox", &[("seen", Number)]),
    (
        Role::Points,
        "point_grant",
        &[("message_id", Id), ("caller", Text), ("order_id", Text)],
    ),
];

/// The inbox of points has the name of accounting's, in another database.
const POINTS_INBOX: Table = (Role::Points, "handfast_inbox", &[("seen", Number)]);

/// A connection to a database in memory that holds a copy. It is consistent only while nobody
/// writes.
pub(super) async fn copy(engines: &Engines) -> Result<SqliteConnection, sqlx::Error> {
    let mut mirror = SqliteConnectOptions::new()
        .filename(":memory:")
        .connect()
        .await?;
    for role in [Role::Payment, Role::Accounting, Role::Points] {
        execute(&mut mirror, format!("ATTACH ':memory:' AS {role}")).await?;
    }
    for role in Role::ALL {
        let Some(mut server) = engines.connect(role).await? else {
            continue;
        };
        let theirs = TABLES.iter().chain([&POINTS_INBOX]);
        for (_, table, columns) in theirs.filter(|(owner, _, _)| *owner == role) {
            copy_table(&mut server, &mut mirror, role, table, columns).await?;
        }
        server.close().await?;
    }
    Ok(mirror)
}

async fn copy_table(
    server: &mut PgConnection,
    mirror: &mut SqliteConnection,
    role: Role,
    table: &str,
    columns: &[(&str, Kind)],
) -> Result<(), sqlx::Error> {
    let schema = match role {
        Role::Service => "main".to_owned(),
        Role::Payment | Role::Accounting | Role::Points => role.to_string(),
    };
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let names = names.join(", ");
    execute(mirror, format!("CREATE TABLE {schema}.{table} ({names})")).await?;
    let wanted: Vec<String> = columns
        .iter()
        .map(|(name, kind)| match kind {
            Id => format!("uuid_send({name})"),
            Number => format!("{name}::bigint"),
            Text => format!("{name}::text"),
            Flag => format!("{name}::int::bigint"),
        })
        .collect();
    let select = format!("SELECT {} FROM {table}", wanted.join(", "));
    let rows = sqlx::query(AssertSqlSafe(select)).fetch_all(server).await?;
    let places = vec!["?"; columns.len()].join(", ");
    let insert = format!("INSERT INTO {schema}.{table} VALUES ({places})");
    execute(mirror, "BEGIN".to_owned()).await?;
    for row in &rows {
        insert_row(mirror, &insert, row, columns).await?;
    }
    execute(mirror, "COMMIT".to_owned()).await
}

async fn insert_row(
    mirror: &mut SqliteConnection,
    insert: &str,
    row: &PgRow,
    columns: &[(&str, Kind)],
) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(insert.to_owned()));
    for (index, (_, kind)) in columns.iter().enumerate() {
        query = match kind {
            Id => query.bind(row.try_get::<Vec<u8>, _>(index)?),
            Number | Flag => query.bind(row.try_get::<Option<i64>, _>(index)?),
            Text => query.bind(row.try_get::<Option<String>, _>(index)?),
        };
    }
    query.execute(mirror).await?;
    Ok(())
}

async fn execute(mirror: &mut SqliteConnection, sql: String) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(mirror).await?;
    Ok(())
}
