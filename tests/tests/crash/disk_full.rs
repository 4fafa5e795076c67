//! The disk under the service's database is full, and then it is not. Embedded engines only: a
//! disk is filled under SQLite here, and under PostgreSQL by the store's own tests.

use std::time::Duration;

use handfast_proto::v1::NewMessage;
use handfast_servers::SmallDisk;
use handfast_tests::clients::{RawConsumer, message};
use handfast_tests::{Config, Engines, Party, World, eventually};
use tonic::Code;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_full_disk_is_unavailable_and_heals_by_itself() {
    let disk = SmallDisk::mount(6).expect("a small disk");
    let config = Config::empty()
        .publisher("source")
        .topic("fact")
        .subscription("sink", "fact");
    let mut world = World::bare(Engines::Embedded, config);
    world.keep_service_in(disk.path().join("service.db"));
    world.start(Party::Service).await;
    let source = world.raw("source");
    let fact = || NewMessage {
        payload: vec![7; 50_000].into(),
        ..message("fact")
    };
    let early = fact();
    source.publish(&early).await;

    let filler = disk.fill().expect("a full disk");
    let refused = eventually("a publish is refused", SOON, async || {
        match source.try_publish(&fact()).await {
            Ok(Ok(state)) => Err(format!("{state:?}")),
            Ok(Err(refused)) => Ok(refused.code),
            Err(status) => Ok(status.code()),
        }
    })
    .await;
    assert_eq!(refused, Code::Unavailable);
    assert!(world.runs("service"), "a full disk does not end it");

    std::fs::remove_file(filler).expect("the filler");
    let late = fact();
    eventually("a publish is kept again", SOON, async || {
        match source.try_publish(&late).await {
            Ok(Ok(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let kept: Vec<_> = world
        .books()
        .await
        .messages
        .into_iter()
        .map(|m| m.id)
        .collect();
    assert!(kept.contains(&early.id) && kept.contains(&late.id));
    let mut sink = RawConsumer::open(world.deliveries(), "fact", "sink", 100).await;
    for _ in &kept {
        let fact = sink.next().await;
        assert_eq!(fact.payload.len(), 50_000);
        sink.consumed(&fact).await;
    }
    world.drained().await.one_decision();
    drop(world);
}

#[tokio::test]
async fn a_prepare_that_found_the_disk_full_succeeds_later_without_a_restart() {
    let disk = SmallDisk::mount(6).expect("a small disk");
    let config = Config::empty()
        // Nobody answers there, so nothing is decided by a check.
        .producer("source", "127.0.0.1:1")
        .topic("fact")
        .subscription("sink", "fact");
    let mut world = World::bare(Engines::Embedded, config);
    world.keep_service_in(disk.path().join("service.db"));
    world.start(Party::Service).await;
    let process = world.process("service").id();
    let source = world.raw("source");
    let filler = disk.fill().expect("a full disk");
    let mut kept = Vec::new();
    let (late, refused) = eventually("a prepare is refused", SOON, async || {
        let fact = NewMessage {
            payload: vec![7; 50_000].into(),
            ..message("fact")
        };
        match source.try_prepare(&fact).await {
            Ok(Ok(state)) => {
                kept.push(fact.id);
                Err(format!("{state:?}"))
            }
            Ok(Err(refused)) => Ok((fact, refused.code)),
            Err(status) => Ok((fact, status.code())),
        }
    })
    .await;
    assert_eq!(refused, Code::Unavailable);
    std::fs::remove_file(filler).expect("the filler");
    eventually("the same prepare is kept", SOON, async || {
        match source.try_prepare(&late).await {
            Ok(Ok(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(world.runs("service") && world.process("service").id() == process);
    kept.push(late.id);
    for id in &kept {
        source.confirm(id).await.expect("a confirm is accepted");
    }
    let mut sink = RawConsumer::open(world.deliveries(), "fact", "sink", 100).await;
    for _ in &kept {
        let fact = sink.next().await;
        assert_eq!(fact.payload.len(), 50_000);
        sink.consumed(&fact).await;
    }
    let books = world.drained().await;
    books.one_decision();
    assert_eq!(books.messages.len(), kept.len(), "nothing else was kept");
    drop(world);
}
