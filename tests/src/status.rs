//! A producer's status endpoint that answers as the test says, rightly or not.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use handfast_proto::v1::business_status_server::{BusinessStatus, BusinessStatusServer};
use handfast_proto::v1::{CheckRequest, CheckResponse, Question, Verdict, VerdictKind};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, async_trait};
use uuid::Uuid;

/// How a status endpoint behaves.
#[derive(Clone, Debug, PartialEq)]
pub enum Behaviour {
    /// The same verdict for every question.
    Says(VerdictKind),
    /// Never answers.
    Hangs,
    /// Answers every call with an error.
    Fails,
    /// Leaves out every question.
    Omits,
    /// Answers for ids that were not asked, with COMMITTED.
    SpeaksOfOthers,
    /// Answers each question twice, with opposite verdicts.
    ContradictsItself,
    /// A reply of more than 1 MiB.
    Floods,
    /// A verdict that does not exist.
    Babbles,
    /// The same reply to every call.
    Replies(CheckResponse),
}

/// A status endpoint; it ends with this value.
#[derive(Debug)]
pub struct StatusStub {
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<Question>>,
    calls: Mutex<u32>,
}

impl StatusStub {
    /// Listens and behaves.
    pub async fn start(address: SocketAddr, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            asked: Mutex::default(),
            calls: Mutex::default(),
        });
        let service = BusinessStatusServer::from_arc(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            let served = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener));
            served.await.expect("the stub serves");
        });
        Self { shared, server }
    }

    /// Behaves otherwise from now on.
    pub fn behaves(&self, behaviour: Behaviour) {
        *self.shared.behaviour.lock().unwrap() = behaviour;
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Question> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// How often it was called so far.
    pub fn calls(&self) -> u32 {
        *self.shared.calls.lock().unwrap()
    }
}

impl Drop for StatusStub {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[async_trait]
impl BusinessStatus for Shared {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let questions = request.into_inner().questions;
        *self.calls.lock().unwrap() += 1;
        self.asked.lock().unwrap().extend(questions.clone());
        let behaviour = self.behaviour.lock().unwrap().clone();
        let ids = questions.into_iter().map(|question| question.message_id);
        let verdict = |message_id, kind: VerdictKind| Verdict {
            message_id,
            kind: kind.into(),
        };
        let other = || Uuid::now_v7().as_bytes().to_vec();
        let verdicts = match behaviour {
            Behaviour::Says(kind) => ids.map(|id| verdict(id, kind)).collect(),
            Behaviour::Hangs => std::future::pending().await,
            Behaviour::Fails => return Err(Status::internal("told to fail")),
            Behaviour::Omits => Vec::new(),
            Behaviour::SpeaksOfOthers => ids
                .map(|_| verdict(other(), VerdictKind::Committed))
                .collect(),
            Behaviour::ContradictsItself => ids
                .flat_map(|id| {
                    [
                        verdict(id.clone(), VerdictKind::Committed),
                        verdict(id, VerdictKind::RolledBack),
                    ]
                })
                .collect(),
            Behaviour::Floods => ids
                .map(|id| verdict(id, VerdictKind::Committed))
                .chain((0..70_000).map(|_| verdict(other(), VerdictKind::Committed)))
                .collect(),
            Behaviour::Babbles => ids
                .map(|message_id| Verdict {
                    message_id,
                    kind: 77,
                })
                .collect(),
            Behaviour::Replies(reply) => reply.verdicts,
        };
        Ok(Response::new(CheckResponse { verdicts }))
    }
}
