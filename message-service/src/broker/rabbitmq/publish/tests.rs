//! Against a real RabbitMQ, because what is proved here is what it and lapin do together.

use lapin::options::{ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use uuid::Uuid;

use super::*;
use crate::broker::rabbitmq::tests::connection;

const QUIET: Duration = Duration::from_secs(10);

async fn channel(connection: &lapin::Connection) -> Channel {
    let channel = connection.create_channel().await.unwrap();
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await.unwrap();
    channel
}

/// A queue with these arguments, and a name that nobody else has.
async fn queue(channel: &Channel, arguments: &[(&'static str, AMQPValue)]) -> String {
    let name = format!("publish-test-{}", Uuid::now_v7());
    let mut table = FieldTable::default();
    table.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    for (argument, value) in arguments {
        table.insert((*argument).into(), value.clone());
    }
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(name.as_str().into(), options, table)
        .await
        .unwrap();
    name
}

async fn delete(channel: &Channel, queue: &str) {
    let options = QueueDeleteOptions::default();
    channel.queue_delete(queue.into(), options).await.unwrap();
}

fn outgoing(queue: &str, headers: FieldTable) -> Outgoing {
    Outgoing {
        queue: queue.to_owned(),
        properties: BasicProperties::default()
            .with_message_id(Uuid::now_v7().to_string().into())
            .with_delivery_mode(2)
            .with_headers(headers),
        payload: b"{}".to_vec(),
    }
}

/// 300 messages of which 200 are for queues that are not there, in no order that helps.
fn mixed(good: &str, round: u32) -> (Vec<Outgoing>, Vec<bool>) {
    let is_good = |n: u32| (n * 7 + round).is_multiple_of(3);
    let messages = (0..300)
        .map(|n| match is_good(n) {
            true => outgoing(good, FieldTable::default()),
            false => outgoing("publish-test-missing", FieldTable::default()),
        })
        .collect();
    (messages, (0..300).map(is_good).collect())
}

async fn fates(channel: &Channel, messages: Vec<Outgoing>) -> Vec<Fate> {
    let mut batch = Batch::start(channel, messages);
    assert_eq!(batch.progress(QUIET).await, Progress::Complete);
    batch.fates("")
}

/// Rounds of 300 messages through a batch, and the same through confirms that are each believed
/// by itself, until the latter were wrong at least once: 20 rounds are wrong every other time.
/// The day they never are, lapin pairs returns with their own confirms.
#[tokio::test]
async fn what_was_returned_is_never_taken_for_sent_under_a_load_that_misleads_naive_confirms() {
    let connection = connection().await;
    let channel = channel(&connection).await;
    let naive = self::channel(&connection).await;
    let good = queue(&channel, &[]).await;
    let mut mistaken = 0;
    let mut round = 0;
    while round < 20 || (mistaken == 0 && round < 2_000) {
        let (messages, routable) = mixed(&good, round);
        let fates = fates(&channel, messages).await;
        for (fate, routable) in fates.iter().zip(routable) {
            match fate {
                Fate::Sent => assert!(routable, "round {round}: an unroutable one is sent"),
                Fate::Returned(_) => assert!(!routable, "round {round}: a good one came back"),
                other => panic!("round {round}: {other:?}"),
            }
        }
        mistaken += believe_each(&naive, mixed(&good, round)).await;
        round += 1;
    }
    assert!(mistaken > 0, "naive confirms were right in {round} rounds");
    delete(&channel, &good).await;
}

/// How many of the messages are taken for the wrong thing.
async fn believe_each(channel: &Channel, (messages, routable): (Vec<Outgoing>, Vec<bool>)) -> u32 {
    let mut confirms = Vec::new();
    for message in messages {
        confirms.push(written(channel, message).await.unwrap());
    }
    let mut mistaken = 0;
    for (confirm, routable) in confirms.into_iter().zip(routable) {
        let returned = matches!(
            confirm.await.unwrap(),
            Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))
        );
        mistaken += u32::from(routable == returned);
    }
    mistaken
}

#[tokio::test]
async fn a_full_queue_rejects_and_its_neighbour_does_not() {
    let connection = connection().await;
    let channel = channel(&connection).await;
    let good = queue(&channel, &[]).await;
    let full = [
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    let full = queue(&channel, &full).await;
    // A quorum queue notices that it is full a moment after it is.
    let until_full = async {
        loop {
            let one = vec![outgoing(&full, FieldTable::default())];
            if fates(&channel, one).await == [Fate::Nacked] {
                return;
            }
        }
    };
    tokio::time::timeout(QUIET, until_full).await.unwrap();
    let messages = (0..20)
        .map(|n| match n % 2 {
            0 => outgoing(&good, FieldTable::default()),
            _ => outgoing(&full, FieldTable::default()),
        })
        .collect();
    let fates = fates(&channel, messages).await;
    assert!(fates.iter().step_by(2).all(|fate| *fate == Fate::Sent));
    let rejected = fates.iter().skip(1).step_by(2);
    assert!(
        rejected.clone().all(|fate| *fate == Fate::Nacked),
        "{fates:?}"
    );
    delete(&channel, &good).await;
    delete(&channel, &full).await;
}

#[tokio::test]
async fn everything_that_was_under_way_when_the_channel_was_closed_over_a_header_is_suspect() {
    let connection = connection().await;
    let channel = channel(&connection).await;
    let good = queue(&channel, &[]).await;
    let mut poison = FieldTable::default();
    poison.insert("CC".into(), AMQPValue::LongString("anything".into()));
    let fates = fates(&channel, vec![outgoing(&good, poison)]).await;
    let [Fate::Suspect(said)] = &fates[..] else {
        panic!("{fates:?}");
    };
    assert!(said.contains("CC") || said.contains("406"), "{said}");
    let fresh = connection.create_channel().await.unwrap();
    delete(&fresh, &good).await;
}

#[tokio::test]
async fn what_finds_its_channel_closed_was_not_tried() {
    let connection = connection().await;
    let channel = channel(&connection).await;
    channel.close(200, "done".into()).await.unwrap();
    let message = outgoing("publish-test-missing", FieldTable::default());
    assert_eq!(fates(&channel, vec![message]).await, [Fate::Untried]);
}

#[tokio::test]
async fn a_channel_without_confirms_is_never_believed() {
    let connection = connection().await;
    let plain = connection.create_channel().await.unwrap();
    let good = queue(&plain, &[]).await;
    let fates = fates(&plain, vec![outgoing(&good, FieldTable::default())]).await;
    assert!(matches!(fates[..], [Fate::Unknown(_)]), "{fates:?}");
    delete(&plain, &good).await;
}
