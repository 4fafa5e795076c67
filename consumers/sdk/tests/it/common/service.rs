//! A service that does what a test tells it, over real gRPC.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use handfast_proto::v1::consume_request::Kind;
use handfast_proto::v1::deliveries_server::{Deliveries, DeliveriesServer};
use handfast_proto::v1::{
    AcknowledgeRequest, AcknowledgeResponse, Answer, AnswerKind, AnswerOutcome, AnswerResult,
    ConsumeRequest, ConsumeResponse, Delivery,
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

use super::PATIENCE;

/// The id of message `number`.
fn id(number: u128) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

pub(crate) struct Service {
    address: String,
    now: i64,
    shared: Arc<Shared>,
    down: CancellationToken,
}

struct Shared {
    script: Mutex<Script>,
    changed: watch::Sender<()>,
}

/// What happened, and what is to happen.
#[derive(Default)]
pub(crate) struct Script {
    due: VecDeque<Delivery>,
    /// Every answer that was recorded, oldest first.
    pub(crate) answers: Vec<Answer>,
    /// Deliveries that were written to a stream.
    pub(crate) sent: usize,
    /// The most deliveries that were written and not answered at one time.
    pub(crate) most_open: usize,
    /// Streams that were opened.
    pub(crate) streams: usize,
    /// Credit of the open stream that is not used.
    pub(crate) credit: u32,
    /// Calls of `Acknowledge`, refused ones included.
    pub(crate) calls: usize,
    /// Calls that record nothing and fail.
    pub(crate) refuse_calls: usize,
    /// How they fail; UNAVAILABLE unless set.
    pub(crate) refuse_with: Option<Code>,
    /// Calls that record their answers and fail all the same.
    pub(crate) lose_replies: usize,
    /// Streams that are refused when they open.
    pub(crate) refuse_streams: VecDeque<Code>,
    /// What every answer is told.
    pub(crate) outcome: Option<AnswerOutcome>,
    stream: Option<CancellationToken>,
}

impl Script {
    /// The kinds of the answers to message `number`, oldest first.
    pub(crate) fn words(&self, number: u128) -> Vec<AnswerKind> {
        self.of(number).map(Answer::kind).collect()
    }

    pub(crate) fn reason(&self, number: u128) -> String {
        self.of(number)
            .last()
            .map_or_else(String::new, |answer| answer.reason.clone())
    }

    fn of(&self, number: u128) -> impl Iterator<Item = &Answer> {
        let id = id(number);
        self.answers.iter().filter(move |a| a.message_id == id)
    }
}

impl Service {
    pub(crate) async fn start(now: i64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            script: Mutex::default(),
            changed: watch::channel(()).0,
        });
        let down = CancellationToken::new();
        let server = Server::builder()
            .add_service(DeliveriesServer::new(Scripted(Arc::clone(&shared))))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                down.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        Self {
            address,
            now,
            shared,
            down,
        }
    }

    pub(crate) fn address(&self) -> String {
        self.address.clone()
    }

    /// A delivery of message `number` whose payload tells the handler what to do.
    pub(crate) fn delivery(&self, number: u128, word: &str) -> Delivery {
        Delivery {
            message_id: id(number),
            subscription: "accounting".to_owned(),
            topic: "payment.completed".to_owned(),
            producer: "payment".to_owned(),
            payload: word.to_owned().into(),
            generation: 1,
            sent_at: self.now + 7,
            first_sent_at: self.now,
            ..Delivery::default()
        }
    }

    pub(crate) fn deliver(&self, number: u128, word: &str) {
        self.deliver_all([self.delivery(number, word)]);
    }

    /// Makes deliveries due at the same moment, so that one batch gets them.
    pub(crate) fn deliver_all(&self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.script(|script| script.due.extend(deliveries));
    }

    /// Ends the open stream, as a service that goes away does.
    pub(crate) fn cut(&self) {
        self.script(|script| {
            if let Some(stream) = script.stream.take() {
                stream.cancel();
            }
        });
    }

    pub(crate) fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        let result = change(&mut self.shared.script.lock().unwrap());
        self.shared.changed.send_replace(());
        result
    }

    pub(crate) async fn until(&self, what: &str, is_so: impl Fn(&Script) -> bool) {
        let mut changed = self.shared.changed.subscribe();
        let wait = changed.wait_for(|()| is_so(&self.shared.script.lock().unwrap()));
        let met = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(met, "waited in vain: {what}");
    }

    pub(crate) async fn until_answers(&self, number: usize) {
        self.until(&format!("{number} answers"), |s| s.answers.len() >= number)
            .await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.down.cancel();
    }
}

struct Scripted(Arc<Shared>);

#[tonic::async_trait]
impl Deliveries for Scripted {
    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.kind);
        assert!(matches!(first, Some(Kind::Open(_))), "{first:?}");
        let token = CancellationToken::new();
        {
            let mut script = self.0.script.lock().unwrap();
            if let Some(code) = script.refuse_streams.pop_front() {
                drop(script);
                self.0.changed.send_replace(());
                return Err(Status::new(code, "told to refuse"));
            }
            script.streams += 1;
            script.credit = 0;
            script.stream = Some(token.clone());
        }
        self.0.changed.send_replace(());
        let (out, stream) = mpsc::channel(16);
        tokio::spawn(feed(Arc::clone(&self.0), token, requests, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn acknowledge(
        &self,
        request: Request<AcknowledgeRequest>,
    ) -> Result<Response<AcknowledgeResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.subscription, "accounting");
        assert!((1..=500).contains(&request.answers.len()));
        let response = {
            let mut script = self.0.script.lock().unwrap();
            script.calls += 1;
            if script.refuse_calls > 0 {
                script.refuse_calls -= 1;
                let code = script.refuse_with.unwrap_or(Code::Unavailable);
                Err(Status::new(code, "told to refuse"))
            } else {
                let outcome = script.outcome.unwrap_or(AnswerOutcome::Recorded);
                let result = |answer: &Answer| AnswerResult {
                    message_id: answer.message_id.clone(),
                    outcome: outcome.into(),
                    error: None,
                };
                let results = request.answers.iter().map(result).collect();
                script.answers.extend(request.answers);
                if script.lose_replies > 0 {
                    script.lose_replies -= 1;
                    Err(Status::unavailable("the reply is lost"))
                } else {
                    Ok(Response::new(AcknowledgeResponse { results }))
                }
            }
        };
        self.0.changed.send_replace(());
        response
    }
}

/// Writes what is due to one stream, as far as its credit goes.
async fn feed(
    shared: Arc<Shared>,
    token: CancellationToken,
    mut requests: Streaming<ConsumeRequest>,
    out: mpsc::Sender<Result<ConsumeResponse, Status>>,
) {
    let mut changed = shared.changed.subscribe();
    let mut half_closed = false;
    let mut unanswered: Vec<Vec<u8>> = Vec::new();
    loop {
        let deliveries: Vec<Delivery> = {
            let mut script = shared.script.lock().unwrap();
            let count = script.due.len().min(script.credit as usize);
            script.credit -= count as u32;
            script.sent += count;
            let open = script.sent.saturating_sub(script.answers.len());
            script.most_open = script.most_open.max(open);
            unanswered.retain(|id| !script.answers.iter().any(|a| a.message_id == *id));
            script.due.drain(..count).collect()
        };
        if !deliveries.is_empty() {
            unanswered.extend(deliveries.iter().map(|d| d.message_id.clone()));
            if out.send(Ok(ConsumeResponse { deliveries })).await.is_err() {
                return;
            }
            shared.changed.send_replace(());
        }
        if half_closed && unanswered.is_empty() {
            return;
        }
        tokio::select! {
            () = token.cancelled() => {
                let _ = out.send(Err(Status::unavailable("told to end"))).await;
                return;
            }
            () = out.closed() => return,
            request = requests.next(), if !half_closed => match request {
                Some(Ok(request)) => {
                    let Some(Kind::Credit(credit)) = request.kind else {
                        panic!("only credit after open: {request:?}");
                    };
                    shared.script.lock().unwrap().credit += credit;
                    shared.changed.send_replace(());
                }
                Some(Err(_)) => return,
                None => {
                    half_closed = true;
                    shared.script.lock().unwrap().credit = 0;
                    shared.changed.send_replace(());
                }
            },
            _ = changed.changed() => {}
        }
    }
}
