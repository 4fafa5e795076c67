//! The processes on the store.

use super::*;

pub(crate) fn presence(n: u128) -> Presence {
    Presence {
        id: Uuid::from_u128(n),
        version: "1.2.3".into(),
        address: format!("127.0.0.1:740{n}"),
        deliveries: 0,
        checks: 0,
        answered: Vec::new(),
    }
}

pub(crate) async fn a_replica_is_listed_with_what_it_said_until_it_leaves(harness: &impl Harness) {
    let store = ready(harness).await;
    assert_eq!(store.replicas().await.unwrap(), []);
    let heard = store.announce(presence(1)).await.unwrap();
    assert_eq!(heard.alive, 1);
    let first = store.replicas().await.unwrap().remove(0);
    assert_eq!(first.seen_at, first.started_at);
    harness.pass(SECOND).await;
    let busy = Presence {
        deliveries: 7,
        checks: 3,
        ..presence(1)
    };
    store.announce(busy).await.unwrap();
    let replicas = store.replicas().await.unwrap();
    let [replica] = &replicas[..] else {
        panic!("{replicas:?}");
    };
    assert_eq!(replica.id, Uuid::from_u128(1));
    assert_eq!(replica.version, "1.2.3");
    assert_eq!(replica.address, "127.0.0.1:7401");
    assert_eq!((replica.deliveries, replica.checks), (7, 3));
    assert_eq!(replica.started_at, first.started_at);
    assert!(replica.seen_at >= first.seen_at.after(SECOND));
    store.leave(Uuid::from_u128(2)).await.unwrap();
    assert_eq!(store.replicas().await.unwrap().len(), 1, "another one");
    store.leave(Uuid::from_u128(1)).await.unwrap();
    assert_eq!(store.replicas().await.unwrap(), []);
}

pub(crate) async fn who_says_that_it_is_there_hears_which_topology_is_in_force(
    harness: &impl Harness,
) {
    let store = ready(harness).await;
    let heard = store.announce(presence(1)).await.unwrap();
    assert_eq!(heard.topology_version, topology().version);
    let mut newer = topology();
    newer.version += 1;
    store.apply_topology(newer.clone()).await.unwrap();
    let heard = store.announce(presence(1)).await.unwrap();
    assert_eq!(heard.topology_version, newer.version);
}
