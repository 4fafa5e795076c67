//! RabbitMQ is killed, and what it held is gone: payments go on, and everything arrives.

use std::fs;
use std::time::Duration;

use handfast_tests::clients::orders;
use handfast_tests::database::number;
use handfast_tests::{Engines, Floor, Party, Servers, World, eventually};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payments_go_on_while_rabbitmq_is_away_and_what_it_lost_is_sent_again() {
    let servers = Servers::own_rabbitmq();
    let mut world = World::with_servers(Engines::Production, servers).await;
    world.start_all().await;
    let payments = world.payments();
    assert_eq!(payments.pay_all(&orders("before", 20)).await, (16, 4));
    world.drained().await;

    // What accounting does not take is held by RabbitMQ.
    world.kill(Party::Accounting).await;
    assert_eq!(payments.pay_all(&orders("held", 50)).await, (40, 10));
    let db = world.database("service").await;
    let held = "SELECT count(*) FROM delivery WHERE subscription = 'accounting' AND state = 'SENT'";
    eventually("RabbitMQ holds what was paid", SOON, async || {
        let held = number(&db, held).await;
        (held == 40)
            .then_some(())
            .ok_or_else(|| format!("{held} of 40"))
    })
    .await;

    let rabbitmq = world.servers.rabbitmq.as_mut().unwrap();
    rabbitmq.kill().unwrap();
    let data = rabbitmq.folder().join("mnesia");
    assert_eq!(payments.pay_all(&orders("during", 25)).await, (20, 5));
    fs::remove_dir_all(&data).expect("what it held is lost");
    let rabbitmq = world.servers.rabbitmq.as_mut().unwrap();
    rabbitmq.start_again().unwrap();
    assert_eq!(payments.pay_all(&orders("after", 10)).await, (8, 2));
    world.start(Party::Accounting).await;

    let books = world.drained().await;
    books.hold(Floor {
        paid: 84,
        refused: 21,
        ..Floor::default()
    });
    // What others passed by counts as one attempt.
    assert!(books.deliveries.iter().all(|d| d.attempts <= 1));
    let again = books.deliveries.iter().filter(|d| d.generation > 1).count();
    assert!(again >= 40, "{again} were sent again; 40 were lost");
}
