//! Each side alone, in front of messages that a test has written by hand.

use handfast_proto::v1::{AcknowledgeRequest, Answer, AnswerKind, BrokerCounts, CountsRequest};
use handfast_tests::{Party, eventually};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::Code;
use uuid::Uuid;

use crate::document::blocks;
use crate::scene::{ACCOUNTING, PATIENCE, Scene};
use crate::scratch::Rabbit;

const DAY_US: i64 = 24 * 3600 * 1_000_000;

async fn now_us(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        .fetch_one(pool)
        .await
        .unwrap()
}

/// A delivery by the contract.
fn delivery(message: Uuid, sent_at: i64, first_sent_at: i64) -> BasicProperties {
    let mut headers = FieldTable::default();
    let mut put = |name: &str, value| {
        headers.insert(name.into(), value);
    };
    put(
        "handfast-subscription",
        AMQPValue::LongString(ACCOUNTING.into()),
    );
    put("handfast-generation", AMQPValue::LongInt(3));
    put("handfast-sent-at", AMQPValue::LongLongInt(sent_at));
    put(
        "handfast-first-sent-at",
        AMQPValue::LongLongInt(first_sent_at),
    );
    BasicProperties::default()
        .with_message_id(message.to_string().into())
        .with_type("payment.completed".into())
        .with_app_id("payment".into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_headers(headers)
}

#[tokio::test]
async fn accounting_rejects_what_its_inbox_may_have_forgotten_and_answers_a_repeat_again() {
    let mut scene = Scene::new().await;
    let rabbit = Rabbit::connect().await;
    let deliveries = scene.deployment.queue(ACCOUNTING);
    let acknowledge = scene.deployment.queue("acknowledge");
    rabbit.declare(deliveries.clone(), Some(5)).await;
    rabbit.declare(acknowledge.clone(), None).await;

    let now = now_us(&scene.books.pool).await;
    let (young, old) = (Uuid::now_v7(), Uuid::now_v7());
    let paid = br#"{"order":"1","account":"ada","amount":5}"#;
    // Sent 5 days ago is remembered, 6 and a bit is not.
    let sent = [
        (young, now - 5 * DAY_US),
        (old, now - 6 * DAY_US - 60_000_000),
        (young, now - 5 * DAY_US),
    ];
    for (message, first_sent_at) in sent {
        let properties = delivery(message, now, first_sent_at);
        rabbit.put(deliveries.clone(), properties, paid).await;
        // Nobody's message, which is thrown away.
        let nobodys = BasicProperties::default();
        rabbit.put(deliveries.clone(), nobodys, b"?").await;
    }

    scene.start_accounting("");
    for (message, word, reason) in [
        (young, "CONSUMED", Value::Null),
        (old, "REJECTED", json!("older than the inbox remembers")),
        (young, "CONSUMED", Value::Null),
    ] {
        let body = eventually("an answer", PATIENCE, async || {
            let taken = rabbit.take(acknowledge.clone()).await;
            taken.ok_or_else(|| "there is none".to_owned())
        })
        .await;
        let mut expected = json!({
            "message_id": message.to_string(), "generation": 3, "sent_at": now, "answer": word,
        });
        if !reason.is_null() {
            expected["reason"] = reason;
        }
        let expected = json!({"subscription": ACCOUNTING, "answers": [expected]});
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap(), expected);
    }
    scene.stop(ACCOUNTING).await;
    assert_eq!(scene.booked().await, [("1".to_owned(), 5)]);
    assert_eq!(rabbit.take(deliveries).await, None, "everything is acked");
}

#[tokio::test]
async fn the_service_reads_the_documents_answers_and_counts_what_it_cannot_use() {
    let mut scene = Scene::new().await;
    scene.world.config = scene.world.config.clone().subscription_with(
        "guarded",
        "payment.completed",
        "amqp_user = \"somebody\"",
    );
    scene.world.start(Party::Service).await;
    let rabbit = Rabbit::connect().await;
    let acknowledge = scene.deployment.queue("acknowledge");
    let [example] = &blocks("json")[..] else {
        panic!("there is one example of answers");
    };
    let answered = |subscription: &str, answers: Value| {
        json!({"subscription": subscription, "answers": answers}).to_string()
    };
    let id = Uuid::now_v7().to_string();
    let good = json!({"message_id": id, "generation": 1, "answer": "CONSUMED"});
    let mut broken = vec![good.clone(); 4];
    broken[0]["generation"] = json!(1.5);
    broken[1]["reason"] = Value::Null;
    broken[2]["answer"] = json!("consumed");
    broken.push(
        json!({"message_id": good["message_id"], "generation": 1, "answer": "LATER",
        "after_ms": 604_800_001}),
    );
    let messages = [
        example.clone(),
        "no JSON".to_owned(),
        answered(ACCOUNTING, json!(broken)),
        answered(ACCOUNTING, json!(vec![good.clone(); 501])),
        answered("nobody", json!([good, good])),
        answered("guarded", json!([good, good, good])),
    ];
    for message in messages {
        let properties = BasicProperties::default();
        rabbit
            .put(acknowledge.clone(), properties, message.as_bytes())
            .await;
    }
    let counts = eventually("all were read", PATIENCE, async || {
        let counts = scene.world.console().counts(CountsRequest {}).await;
        let broker: BrokerCounts = counts.unwrap().into_inner().broker.unwrap_or_default();
        match broker.foreign_answers {
            0 => Err(format!("{broker:?}")),
            _ => Ok(broker),
        }
    })
    .await;
    // A message that cannot be read counts once: two of them, and four answers in the third.
    assert_eq!(counts.unreadable_answers, 6);
    assert_eq!(counts.unknown_answers, 2);
    assert_eq!(counts.foreign_answers, 3);
    // Nor does a call prove who speaks for the guarded one.
    let request = AcknowledgeRequest {
        subscription: "guarded".to_owned(),
        answers: vec![Answer {
            message_id: Uuid::now_v7().as_bytes().to_vec(),
            generation: 1,
            kind: AnswerKind::Consumed.into(),
            ..Answer::default()
        }],
    };
    let refused = scene.world.deliveries().acknowledge(request).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}
