//! A status server that is asked as Handfast asks.

use handfast_producer::proto::v1::business_status_client::BusinessStatusClient;
use handfast_producer::proto::v1::{self, CheckRequest, VerdictKind};
use handfast_producer::{Fence, FenceDatabase, FenceIdentity, StatusServer};
use sqlx::Pool;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;
use uuid::Uuid;

#[derive(Clone)]
pub(crate) struct Asking {
    pub(crate) client: BusinessStatusClient<Channel>,
    pub(crate) fence: FenceIdentity,
    pub(crate) now_us: i64,
    _stop: Arc<DropGuard>,
}

pub(crate) async fn serving(server: StatusServer) -> (BusinessStatusClient<Channel>, DropGuard) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    tokio::spawn(server.serve_on(listener, stop.clone()));
    let client = BusinessStatusClient::connect(url).await.unwrap();
    (client, stop.drop_guard())
}

impl Asking {
    pub(crate) async fn about<DB: FenceDatabase>(pool: &Pool<DB>) -> Self {
        let (client, stop) = serving(StatusServer::new().fence(pool.clone())).await;
        Self {
            client,
            fence: Fence::open(pool).await.unwrap().identity(),
            now_us: DB::now_us(pool).await.unwrap(),
            _stop: Arc::new(stop),
        }
    }

    pub(crate) fn question(&self, id: Uuid) -> v1::Question {
        v1::Question {
            message_id: id.as_bytes().to_vec(),
            topic: "order.paid".into(),
            key: None,
            fence: self.fence.as_bytes().to_vec(),
            prepared_at: self.now_us,
        }
    }

    pub(crate) async fn ask(&mut self, question: v1::Question) -> VerdictKind {
        self.ask_all(vec![question]).await[0]
    }

    pub(crate) async fn ask_all(&mut self, questions: Vec<v1::Question>) -> Vec<VerdictKind> {
        let ids: Vec<_> = questions
            .iter()
            .map(|question| question.message_id.clone())
            .collect();
        let reply = self.client.check(CheckRequest { questions }).await.unwrap();
        let verdicts = reply.into_inner().verdicts;
        let answered: Vec<_> = verdicts
            .iter()
            .map(|verdict| verdict.message_id.clone())
            .collect();
        assert_eq!(answered, ids);
        verdicts.iter().map(v1::Verdict::kind).collect()
    }
}
