//! One producer and several addresses of Handfast.

use std::time::{Duration, Instant};

use handfast_producer::{CallError, ConnectError, Message, Producer};
use tokio::net::TcpListener;
use tonic::Code;

use crate::scripted::{Fault, PATIENCE, Scripted};

/// Below what the SDK gives a call that is not answered.
const AT_ONCE: Duration = Duration::from_secs(2);

/// An address, and the socket that nobody serves yet: connections are taken, and no call is
/// answered.
async fn frozen() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (url, listener)
}

async fn connect(urls: &[&str]) -> Producer {
    Producer::connect(urls.join(","), "orders").await.unwrap()
}

async fn publish(producer: &Producer) -> Result<Duration, CallError> {
    let began = Instant::now();
    producer.publish(&Message::new("t")).await?;
    Ok(began.elapsed())
}

#[tokio::test]
async fn several_addresses_take_turns() {
    let (one, other) = (Scripted::start().await, Scripted::start().await);
    let producer = connect(&[&one.url, &other.url]).await;
    for _ in 0..100 {
        publish(&producer).await.unwrap();
    }
    let (of_one, of_other) = (one.calls("publish").len(), other.calls("publish").len());
    assert_eq!(of_one + of_other, 100, "nothing was repeated");
    assert!(of_one.abs_diff(of_other) <= 10, "{of_one} and {of_other}");
}

#[tokio::test]
async fn an_address_where_nobody_listens_fails_no_call() {
    let live = Scripted::start().await;
    let (dead, listener) = frozen().await;
    drop(listener);
    let producer = connect(&[&dead, &live.url]).await;
    for _ in 0..100 {
        assert!(publish(&producer).await.unwrap() < AT_ONCE);
    }
    assert_eq!(live.calls("publish").len(), 100);
}

#[tokio::test]
async fn an_address_that_does_not_answer_holds_up_what_it_was_sent_and_nothing_else() {
    let live = Scripted::start().await;
    let (url, listener) = frozen().await;
    let producer = connect(&[&url, &live.url]).await;
    let held_up = {
        let producer = producer.clone();
        tokio::spawn(async move { publish(&producer).await.unwrap() })
    };
    let taken = tokio::time::timeout(PATIENCE, listener.accept());
    let (connection, _) = taken.await.unwrap().unwrap();
    // That call is held up, and none that comes now.
    for _ in 0..100 {
        let took = publish(&producer).await.unwrap();
        assert!(took < AT_ONCE, "{took:?}");
    }
    let held_up = held_up.await.unwrap();
    assert!(held_up > AT_ONCE && held_up < PATIENCE, "{held_up:?}");
    // It is left alone until it answers, and takes its turn again.
    for _ in 0..100 {
        assert!(publish(&producer).await.unwrap() < AT_ONCE);
    }
    drop(connection);
    let back = Scripted::start_on(listener);
    let turns = async {
        while back.calls("publish").is_empty() {
            publish(&producer).await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, turns).await.unwrap();
}

#[tokio::test]
async fn what_failed_at_one_address_is_repeated_at_the_other() {
    let (one, other) = (Scripted::start().await, Scripted::start().await);
    one.script("publish", vec![Fault::Fail(Code::Unavailable); 10_000]);
    let producer = connect(&[&one.url, &other.url]).await;
    for _ in 0..50 {
        publish(&producer).await.unwrap();
    }
    assert_eq!(other.calls("publish").len(), 50);
}

#[tokio::test]
async fn without_any_address_that_answers_a_call_says_what_is_wrong() {
    let (first, listener) = frozen().await;
    let (second, other) = frozen().await;
    drop((listener, other));
    let producer = connect(&[&first, &second]).await;
    let producer = producer.with_deadline(Duration::from_millis(500));
    let refused = publish(&producer).await.unwrap_err();
    assert!(matches!(refused, CallError::Unavailable { .. }));
    assert!(refused.to_string().contains("Unavailable"), "{refused}");
}

#[tokio::test]
async fn addresses_are_checked_and_bounded() {
    let many: Vec<_> = (1..=17)
        .map(|port| format!("http://127.0.0.1:{port}"))
        .collect();
    let refused = Producer::connect(many.join(","), "orders").await;
    assert!(matches!(
        refused.unwrap_err(),
        ConnectError::TooMany { given: 17 }
    ));
    // The same one twice is one.
    let twice = format!("{0}, {0}", many[..16].join(","));
    Producer::connect(twice, "orders").await.unwrap();
    let refused = Producer::connect("http://127.0.0.1:1,", "orders").await;
    assert!(matches!(refused.unwrap_err(), ConnectError::Url { .. }));
}
