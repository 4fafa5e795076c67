//! A commit that gives no word.

use handfast_scratch::Scratch;
use sqlx::{PgPool, Postgres};
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

fn message() -> Delivered {
    Delivered {
        message_id: Uuid::from_u128(1),
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

#[tokio::test]
async fn a_commit_that_gives_no_word_is_later_and_the_inbox_knows_what_happened() {
    let scratch = Scratch::create().await;
    let pool = PgPool::connect_with(scratch.options()).await.unwrap();
    crate::migrate(&pool).await.unwrap();
    sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
    let (answers, mut answered) = mpsc::channel(16);
    let mut effects = Effects {
        pool: pool.clone(),
        subscription: "accounting".to_owned(),
        handler: Effect,
        limits: Limits {
            handler_timeout: PATIENCE,
            inbox_wait: PATIENCE,
            commit_wait: Duration::from_millis(200),
            remembers: Duration::MAX,
        },
        answers,
    };
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1)")
        .execute(&mut *lock)
        .await
        .unwrap();
    let batch = [message()];
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
