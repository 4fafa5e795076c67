//! A server, a store on it, and messages to keep there.

use std::sync::Arc;
use std::time::Duration;

use handfast_servers::{Options, Postgres};
use handfast_service::clock::SystemClock;
use handfast_service::message::{MessageId, NewMessage};
use handfast_service::store::postgres::{Address, OpenError, PostgresStore};
use handfast_service::store::{Error, Handoff, Store as _};
use handfast_service::topology::{Producer, Subscription, Topic, Topology};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tokio::time::Instant;
use uuid::Uuid;

/// How soon all is well again once the server is.
pub(crate) const READY_WITHIN: Duration = Duration::from_secs(5);

/// Starts a server with these settings.
pub(crate) fn server(settings: &[(&str, &str)]) -> Postgres {
    Postgres::start_with(&Options::new().with_settings(settings)).unwrap()
}

pub(crate) async fn try_open(server: &Postgres) -> Result<Arc<PostgresStore>, OpenError> {
    let address: Address = server.url("postgres").parse().unwrap();
    let store = PostgresStore::open(address, Arc::new(SystemClock::new()), 1).await?;
    Ok(Arc::new(store))
}

/// A store with one subscription.
pub(crate) async fn open(server: &Postgres) -> Arc<PostgresStore> {
    let store = try_open(server).await.unwrap();
    let subscription = Subscription {
        topic: "paid".into(),
        policy: Default::default(),
        max_in_queue: None,
        amqp_user: None,
    };
    let topology = Topology {
        version: 1,
        producers: [("payment".to_owned(), Producer::default())].into(),
        topics: [("paid".to_owned(), Topic::default())].into(),
        subscriptions: [("accounting".to_owned(), subscription)].into(),
    };
    store.apply_topology(topology).await.unwrap();
    store
}

pub(crate) fn id(n: u128) -> MessageId {
    MessageId::from(Uuid::from_u128(n))
}

pub(crate) fn paid(n: u128, bytes: usize) -> NewMessage {
    let mut payload = vec![0; bytes];
    // Bytes that do not become fewer by compression.
    StdRng::seed_from_u64(u64::try_from(n).unwrap()).fill_bytes(&mut payload);
    NewMessage {
        id: id(n),
        producer: "payment".into(),
        topic: "paid".into(),
        key: None,
        content_type: String::new(),
        headers: Vec::new(),
        payload,
        deliver_after: None,
        fence: None,
    }
}

/// Publishes until it works; panics after [`READY_WITHIN`].
pub(crate) async fn ready_again(store: &PostgresStore, n: u128) {
    let began = Instant::now();
    while let Err(error) = store.publish(vec![paid(n, 100)], Handoff::none()).await {
        assert!(
            matches!(error, Error::Unavailable { .. }) && began.elapsed() < READY_WITHIN,
            "{error}"
        );
        tokio::task::yield_now().await;
    }
}

/// All of a message is there: its delivery and its body.
pub(crate) async fn is_whole(store: &PostgresStore, n: u128) -> bool {
    match store.show(id(n), true).await.unwrap() {
        Some(shown) => {
            assert_eq!((shown.deliveries.len(), shown.body.is_some()), (1, true));
            true
        }
        None => false,
    }
}
