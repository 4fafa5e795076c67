//! A service on a loopback port with its own database file, and the words to speak to it.

use std::sync::Arc;
use std::time::Duration;

use handfast_proto::v1 as proto;
use handfast_proto::v1::console_client::ConsoleClient;
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_service::answered::Answered;
use handfast_service::api;
use handfast_service::broker::embedded::{self, Embedded};
use handfast_service::clock::SystemClock;
use handfast_service::message::{DeliveryPolicy, MessageId};
use handfast_service::service::{Service, Settings};
use handfast_service::store::sqlite::SqliteStore;
use handfast_service::store::{DeliveryClaim, Lane, Store as _};
use handfast_service::topology::{Producer, Snapshot, Subscription, Topic, Topology};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::pb;

pub(crate) const TOPIC: &str = "payment.completed";
pub(crate) const LONELY: &str = "nobody.listens";
pub(crate) const OPEN: &str = "may.be.lonely";
pub(crate) const RESTRICTED: &str = "orders.only";

/// Longer than any test takes; a test that needs more has hung.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) store: Arc<SqliteStore>,
    pub(crate) topology: Arc<Snapshot>,
    pub(crate) channel: Channel,
    pub(crate) messages: MessagesClient<Channel>,
    pub(crate) deliveries: DeliveriesClient<Channel>,
    pub(crate) console: ConsoleClient<Channel>,
    _folder: tempfile::TempDir,
}

/// `payment` has a status endpoint, `orders` too, `legacy` has none. `payment.completed` is
/// read by `accounting` and `points`.
pub(crate) fn topology(version: u64) -> Topology {
    let checked = Producer {
        status_endpoint: Some("http://127.0.0.1:1".into()),
        ..Producer::default()
    };
    let subscription = |topic: &str| Subscription {
        topic: topic.into(),
        policy: DeliveryPolicy::default(),
        max_in_queue: None,
        amqp_user: None,
    };
    Topology {
        version,
        producers: [
            ("payment".into(), checked.clone()),
            ("orders".into(), checked),
            ("legacy".into(), Producer::default()),
        ]
        .into(),
        topics: [
            (TOPIC.into(), Topic::default()),
            (LONELY.into(), Topic::default()),
            (
                OPEN.into(),
                Topic {
                    may_have_no_subscriber: true,
                    ..Topic::default()
                },
            ),
            (
                RESTRICTED.into(),
                Topic {
                    producers: ["orders".into()].into(),
                    may_have_no_subscriber: true,
                },
            ),
        ]
        .into(),
        subscriptions: [
            ("accounting".into(), subscription(TOPIC)),
            ("points".into(), subscription(TOPIC)),
        ]
        .into(),
    }
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(Settings::default()).await
    }

    pub(crate) async fn with(settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock::new());
        let path = folder.path().join("handfast.db");
        let store = Arc::new(SqliteStore::open(&path, clock.clone(), 7).await.unwrap());
        store.apply_topology(topology(1)).await.unwrap();
        let topology = Arc::new(Snapshot::new(store.topology().await.unwrap()));
        let answered = Arc::new(Answered::default());
        let embedded = Embedded::new(
            store.clone(),
            topology.clone(),
            clock,
            embedded::Settings::default(),
        );
        let service = Service::new(
            store.clone(),
            topology.clone(),
            embedded.clone(),
            answered,
            settings,
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let options = api::Options { reflection: true };
        let routes = api::router(service, Some(embedded), options).unwrap();
        let server = api::server_builder().add_routes(routes);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Channel::from_shared(address).unwrap();
        let channel = channel.connect().await.unwrap();
        Self {
            store,
            topology,
            messages: MessagesClient::new(channel.clone()),
            deliveries: DeliveriesClient::new(channel.clone()),
            console: ConsoleClient::new(channel.clone()),
            channel,
            _folder: folder,
        }
    }

    pub(crate) async fn prepare(
        &mut self,
        producer: &str,
        messages: Vec<proto::NewMessage>,
    ) -> Result<Vec<proto::ItemResult>, tonic::Status> {
        let producer = producer.to_owned();
        let request = proto::PrepareRequest { producer, messages };
        let response = self.messages.prepare(request).await;
        response.map(|response| response.into_inner().results)
    }

    pub(crate) async fn publish(
        &mut self,
        producer: &str,
        messages: Vec<proto::NewMessage>,
    ) -> Result<Vec<proto::ItemResult>, tonic::Status> {
        let producer = producer.to_owned();
        let request = proto::PublishRequest { producer, messages };
        let response = self.messages.publish(request).await;
        response.map(|response| response.into_inner().results)
    }

    pub(crate) async fn confirm(
        &mut self,
        producer: &str,
        message_ids: Vec<Vec<u8>>,
    ) -> Result<Vec<proto::ItemResult>, tonic::Status> {
        let producer = producer.to_owned();
        let request = proto::ConfirmRequest {
            producer,
            message_ids,
        };
        let response = self.messages.confirm(request).await;
        response.map(|response| response.into_inner().results)
    }

    pub(crate) async fn cancel(
        &mut self,
        producer: &str,
        message_ids: Vec<Vec<u8>>,
    ) -> Result<Vec<proto::ItemResult>, tonic::Status> {
        let producer = producer.to_owned();
        let request = proto::CancelRequest {
            producer,
            message_ids,
        };
        let response = self.messages.cancel(request).await;
        response.map(|response| response.into_inner().results)
    }

    pub(crate) async fn get(&mut self, producer: &str, id: u128) -> proto::GetResult {
        let request = proto::GetRequest {
            producer: producer.to_owned(),
            message_ids: vec![an_id(id)],
        };
        let response = self.messages.get(request).await.unwrap();
        response.into_inner().results.remove(0)
    }

    pub(crate) async fn acknowledge(
        &mut self,
        subscription: &str,
        answers: Vec<proto::Answer>,
    ) -> Result<Vec<proto::AnswerResult>, tonic::Status> {
        let request = proto::AcknowledgeRequest {
            subscription: subscription.to_owned(),
            answers,
        };
        let response = self.deliveries.acknowledge(request).await;
        response.map(|response| response.into_inner().results)
    }

    pub(crate) async fn counts(&mut self) -> proto::CountsResponse {
        let counts = self.console.counts(proto::CountsRequest {}).await;
        counts.unwrap().into_inner()
    }

    /// How many messages are kept, in whatever state.
    pub(crate) async fn kept(&mut self) -> u64 {
        let counts = self.counts().await;
        counts.prepared + counts.confirmed + counts.cancelled
    }

    /// Leases what is due, as a broker would.
    pub(crate) async fn claim(&self, subscription: &str) -> Vec<DeliveryClaim> {
        let lane = Lane::Normal {
            limit: 100,
            max_bytes: 1 << 20,
        };
        let claimed = self.store.claim_deliveries(subscription, lane, DEADLINE);
        claimed.await.unwrap().deliveries
    }
}

pub(crate) fn an_id(id: u128) -> Vec<u8> {
    uuid::Uuid::from_u128(id).as_bytes().to_vec()
}

pub(crate) fn message_id(id: u128) -> MessageId {
    MessageId::from(uuid::Uuid::from_u128(id))
}

/// A message with its own key.
pub(crate) fn a_message(id: u128) -> proto::NewMessage {
    proto::NewMessage {
        id: an_id(id),
        topic: TOPIC.into(),
        key: Some(format!("order {id}")),
        content_type: "application/json".into(),
        payload: format!("{{\"order\":{id}}}").into_bytes().into(),
        ..proto::NewMessage::default()
    }
}

pub(crate) fn an_answer(id: u128, generation: u32, kind: proto::AnswerKind) -> proto::Answer {
    proto::Answer {
        message_id: an_id(id),
        generation,
        sent_at: 0,
        kind: kind as i32,
        reason: "because".into(),
        later_ms: 0,
    }
}

/// The state that an item was answered with.
#[track_caller]
pub(crate) fn state(result: &proto::ItemResult) -> proto::MessageState {
    match &result.outcome {
        Some(proto::item_result::Outcome::State(state)) => (*state).try_into().unwrap(),
        other => panic!("{other:?} is no state"),
    }
}

/// The refusal that an item was answered with.
#[track_caller]
pub(crate) fn refusal(result: &proto::ItemResult) -> (Code, &pb::Status) {
    match &result.outcome {
        Some(proto::item_result::Outcome::Error(status)) => (status.code.into(), status),
        other => panic!("{other:?} is no refusal"),
    }
}
