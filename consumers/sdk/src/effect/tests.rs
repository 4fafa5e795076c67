//! A commit that gives no word, and connections from one transaction to the next.

use handfast_scratch::Scratch;
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection as _, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::*;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes a commit wait for a lock that somebody holds, as for a server that has gone away.
const SCHEMA: &str = "
    CREATE TABLE effect (message_id uuid NOT NULL);
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON effect
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()";

struct Effect;

impl BatchHandler<Postgres> for Effect {
    async fn handle_batch(&self, tx: &mut Tx<Postgres>, messages: &[Delivered]) -> Vec<Answer> {
        for message in messages {
            sqlx::query("INSERT INTO effect (message_id) VALUES ($1)")
                .bind(message.message_id)
                .execute(&mut *tx)
                .await
                .unwrap();
        }
        vec![Answer::Consumed; messages.len()]
    }
}

fn message(id: u128) -> Delivered {
    Delivered {
        message_id: Uuid::from_u128(id),
        subscription: "accounting".to_owned(),
        topic: "payment.completed".to_owned(),
        producer: "payment".to_owned(),
        key: None,
        content_type: String::new(),
        headers: Vec::new(),
        payload: tokio_util::bytes::Bytes::new(),
        generation: 1,
        sent_at: 0,
        first_sent_at: i64::MAX,
        alone: false,
    }
}

fn effects<H>(pool: &PgPool, answers: mpsc::Sender<Answered>, handler: H) -> Effects<Postgres, H> {
    Effects {
        connections: Connections::new(pool.clone()),
        subscription: "accounting".to_owned(),
        handler,
        limits: Limits {
            handler_timeout: PATIENCE,
            inbox_wait: PATIENCE,
            commit_wait: PATIENCE,
            remembers: Duration::MAX,
        },
        answers,
    }
}

/// A pool of at most so many connections, the tables, and what applies effects there.
async fn pool_of<H>(
    scratch: &Scratch,
    most: u32,
    answers: mpsc::Sender<Answered>,
    handler: H,
) -> (PgPool, Effects<Postgres, H>) {
    let pool = PgPoolOptions::new().max_connections(most);
    let pool = pool.connect_with(scratch.options()).await.unwrap();
    crate::migrate(&pool).await.unwrap();
    sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
    let effects = effects(&pool, answers, handler);
    (pool, effects)
}

#[tokio::test]
async fn a_commit_that_gives_no_word_is_later_and_the_inbox_knows_what_happened() {
    let scratch = Scratch::create().await;
    let (answers, mut answered) = mpsc::channel(16);
    let (pool, mut effects) = pool_of(&scratch, 10, answers, Effect).await;
    effects.limits.commit_wait = Duration::from_millis(200);
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1)")
        .execute(&mut *lock)
        .await
        .unwrap();
    let batch = [message(1)];
    let given_up = timeout(PATIENCE, effects.apply(&batch)).await.unwrap();
    assert_eq!(given_up.later, 1);
    assert_eq!(
        given_up.database_unavailable.as_deref(),
        Some("waited 200 ms for the commit")
    );
    assert!(matches!(
        answered.recv().await.unwrap().answer,
        Answer::Later(_)
    ));

    // Nobody hears what becomes of it now.
    lock.rollback().await.unwrap();
    effects.limits.commit_wait = PATIENCE;
    let again = effects.apply(&batch).await;
    assert_eq!(again.consumed + again.duplicates, 1);
    let effects: i64 = sqlx::query_scalar("SELECT count(*) FROM effect")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(effects, 1);
}

/// Connections that somebody has taken.
fn taken(pool: &PgPool) -> u32 {
    pool.size() - pool.num_idle() as u32
}

async fn until_all_are_back(pool: &PgPool) {
    let back = async {
        while taken(pool) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, back).await.unwrap();
}

#[tokio::test]
async fn a_connection_is_kept_for_the_next_transaction_and_goes_back_when_none_comes() {
    let scratch = Scratch::create().await;
    let (answers, _answered) = mpsc::channel(16);
    let (pool, effects) = pool_of(&scratch, 10, answers, Effect).await;
    until_all_are_back(&pool).await;
    for id in 1..=3 {
        assert_eq!(effects.apply(&[message(id)]).await.consumed, 1);
        assert_eq!(taken(&pool), 1, "it is kept");
    }
    let unused = async {
        while effects.connections.tidy() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, unused).await.unwrap();
    until_all_are_back(&pool).await;
}

#[tokio::test]
async fn kept_connections_that_were_lost_cost_no_message_its_turn() {
    let scratch = Scratch::create().await;
    let (answers, _answered) = mpsc::channel(16);
    let (pool, mut effects) = pool_of(&scratch, 10, answers, Effect).await;
    effects.connections.idle = PATIENCE;
    let two = tokio::join!(effects.connections.take(), effects.connections.take());
    for taken in [two.0, two.1] {
        let mut taken = taken.unwrap();
        taken.held.clean = true;
        effects.connections.put(taken);
    }
    let mut other = PgConnection::connect_with(&scratch.options())
        .await
        .unwrap();
    let lost = sqlx::query_scalar::<_, bool>(
        "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity
          WHERE datname = current_database() AND pid != pg_backend_pid()",
    );
    assert!(lost.fetch_all(&mut other).await.unwrap().len() >= 2);
    assert!(effects.connections.tidy(), "they are kept");
    let report = effects.apply(&[message(1)]).await;
    assert_eq!((report.consumed, report.later), (1, 0), "{report:?}");
    drop(pool);
}

/// Gives up a savepoint half-way, after which sqlx rolls everything back with the next statement.
struct GivesUp;

impl BatchHandler<Postgres> for GivesUp {
    async fn handle_batch(&self, tx: &mut Tx<Postgres>, messages: &[Delivered]) -> Vec<Answer> {
        assert!(tx.begin().now_or_never().is_none());
        vec![Answer::failed("gave up"); messages.len()]
    }
}

#[tokio::test]
async fn a_connection_with_something_left_to_roll_back_is_not_kept() {
    let scratch = Scratch::create().await;
    let (answers, _answered) = mpsc::channel(16);
    let (pool, effects) = pool_of(&scratch, 10, answers, GivesUp).await;
    assert_eq!(effects.apply(&[message(1)]).await.failed, 1);
    assert!(!effects.connections.tidy(), "nothing is kept");
    until_all_are_back(&pool).await;
    let open: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity
          WHERE datname = current_database() AND state LIKE 'idle in transaction%'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(open, 0);
}

/// Goes on after an error, as if each message had a transaction of its own.
struct GoesOn {
    and_hides_it: bool,
}

impl BatchHandler<Postgres> for GoesOn {
    async fn handle_batch(&self, tx: &mut Tx<Postgres>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for message in messages {
            let statement = match message.message_id.as_u128() {
                1 => "SELECT 1 / 0",
                2 => "SAVEPOINT",
                _ => "INSERT INTO effect (message_id) SELECT gen_random_uuid()",
            };
            let done = match statement {
                "SAVEPOINT" => tx.begin().await.map(drop),
                statement => sqlx::query(statement).execute(&mut *tx).await.map(drop),
            };
            answers.push(match done {
                Err(error) if !self.and_hides_it => Answer::failed(error),
                _ => Answer::Consumed,
            });
        }
        answers
    }
}

#[tokio::test]
async fn what_a_handler_wrote_after_the_end_of_its_transaction_is_not_applied_again() {
    for and_hides_it in [false, true] {
        let scratch = Scratch::create().await;
        let (answers, mut answered) = mpsc::channel(16);
        let (pool, effects) = pool_of(&scratch, 10, answers, GoesOn { and_hides_it }).await;
        let batch = [message(1), message(2), message(3)];
        assert_eq!(effects.apply(&batch).await.rejected, 3);
        for _ in batch {
            let word = answered.recv().await.unwrap().answer;
            assert!(matches!(word, Answer::Rejected(_)), "{word:?}");
        }
        let effects: i64 = sqlx::query_scalar("SELECT count(*) FROM effect")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(effects, 1, "sqlx let it through, once");
    }
}

#[tokio::test]
async fn others_have_their_turn_at_a_pool_of_one() {
    let scratch = Scratch::create().await;
    let (answers, _answered) = mpsc::channel(16);
    let (pool, effects) = pool_of(&scratch, 1, answers, Effect).await;
    assert_eq!(effects.apply(&[message(1)]).await.consumed, 1);
    let others = timeout(PATIENCE, pool.acquire()).await;
    assert!(others.unwrap().is_ok());
}

#[test]
fn connections_may_be_dropped_by_a_thread_that_is_in_no_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (connections, scratch) = runtime.block_on(async {
        let scratch = Scratch::create().await;
        let pool = PgPool::connect_with(scratch.options()).await.unwrap();
        let connections = Connections::new(pool);
        let mut taken = connections.take().await.unwrap();
        taken.held.clean = true;
        connections.put(taken);
        (connections, scratch)
    });
    assert!(connections.tidy(), "it is kept");
    drop(connections);
    drop(scratch);
}
