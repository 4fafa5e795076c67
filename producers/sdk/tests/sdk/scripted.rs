//! A service in this process that keeps messages in memory and can be told to misbehave.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use handfast_producer::proto::v1::messages_server::{Messages, MessagesServer};
use handfast_producer::proto::v1::*;
use handfast_producer::proto::v1::{get_result, item_result};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, async_trait};
use tonic_types::{ErrorDetails, StatusExt as _};
use uuid::Uuid;

/// How long a condition may take to come true.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a call does instead of working.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Works, and then says UNAVAILABLE, as if the reply was lost.
    LoseReply,
    /// Does nothing and says this.
    Fail(Code),
    /// Waits until it is let go, then works.
    Wait(Arc<Notify>),
    /// Each item is refused with this code.
    RefuseItems(Code),
    /// Forgets the messages, then works.
    Forget,
    /// Cancels what it has just prepared, and loses the reply.
    CancelAndLoseReply,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kept {
    pub(crate) message: NewMessage,
    pub(crate) state: MessageState,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) messages: HashMap<Uuid, Kept>,
    /// Every call: its verb and how many items it carried.
    pub(crate) calls: Vec<(&'static str, usize)>,
    pub(crate) faults: HashMap<&'static str, VecDeque<Fault>>,
    /// Ids in the order in which they were first prepared.
    pub(crate) prepared: Vec<Uuid>,
}

#[derive(Clone)]
pub(crate) struct Scripted {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    _stop: Arc<DropGuard>,
}

#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

impl Scripted {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_on(listener)
    }

    pub(crate) fn start_on(listener: TcpListener) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let service = Service {
            state: Arc::default(),
            changed: Arc::default(),
        };
        let (state, changed) = (service.state.clone(), service.changed.clone());
        let server = tonic::transport::Server::builder()
            .add_service(MessagesServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(server).await });
        Self {
            url,
            state,
            changed,
            _stop: Arc::new(stop.drop_guard()),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The next calls of a verb meet these faults, one each.
    pub(crate) fn script(&self, verb: &'static str, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults.entry(verb).or_default().extend(faults);
    }

    /// Waits until something is true of the state.
    pub(crate) async fn until(&self, what: &str, mut holds: impl FnMut(&State) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if holds(&self.state()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("not in time: {what}; {:?}", self.state());
        }
    }

    /// Puts a message there as another process would.
    pub(crate) fn hold(&self, topic: &str, key: &str, state: MessageState) -> Uuid {
        let id = Uuid::now_v7();
        let message = NewMessage {
            id: id.as_bytes().to_vec(),
            topic: topic.into(),
            key: Some(key.into()),
            ..NewMessage::default()
        };
        self.state().messages.insert(id, Kept { message, state });
        id
    }

    pub(crate) fn set(&self, id: Uuid, state: MessageState) {
        self.state().messages.get_mut(&id).unwrap().state = state;
        self.changed.notify_waiters();
    }

    pub(crate) fn message_state(&self, id: Uuid) -> Option<MessageState> {
        self.state().messages.get(&id).map(|kept| kept.state)
    }

    pub(crate) fn states(&self) -> Vec<MessageState> {
        self.state()
            .messages
            .values()
            .map(|kept| kept.state)
            .collect()
    }

    pub(crate) fn calls(&self, verb: &str) -> Vec<usize> {
        let state = self.state();
        let calls = state.calls.iter().filter(|(called, _)| *called == verb);
        calls.map(|(_, items)| *items).collect()
    }
}

impl Service {
    /// Takes a call through its fault; `work` handles one item.
    async fn call<I, R>(
        &self,
        verb: &'static str,
        items: Vec<I>,
        work: impl Fn(&mut State, &I) -> Result<R, Status>,
    ) -> Result<Vec<Result<R, Status>>, Status> {
        let fault = {
            let mut state = self.state.lock().unwrap();
            state.calls.push((verb, items.len()));
            state.faults.get_mut(verb).and_then(VecDeque::pop_front)
        };
        self.changed.notify_waiters();
        match &fault {
            Some(Fault::Fail(code)) => return Err(Status::new(*code, "as told")),
            Some(Fault::Wait(go)) => go.notified().await,
            Some(Fault::Forget) => self.state.lock().unwrap().messages.clear(),
            Some(Fault::RefuseItems(code)) => {
                let refuse = |_| Err(Status::new(*code, "as told"));
                return Ok(items.iter().map(refuse).collect());
            }
            Some(Fault::LoseReply | Fault::CancelAndLoseReply) | None => {}
        }
        let results = {
            let mut state = self.state.lock().unwrap();
            let results = items.iter().map(|item| work(&mut state, item)).collect();
            if let Some(Fault::CancelAndLoseReply) = fault {
                for kept in state.messages.values_mut() {
                    kept.state = MessageState::Cancelled;
                }
            }
            results
        };
        self.changed.notify_waiters();
        match fault {
            Some(Fault::LoseReply | Fault::CancelAndLoseReply) => {
                Err(Status::unavailable("the reply is lost"))
            }
            _ => Ok(results),
        }
    }

    async fn decide(
        &self,
        verb: &'static str,
        ids: Vec<Vec<u8>>,
        to: MessageState,
    ) -> Result<Vec<ItemResult>, Status> {
        let results = self
            .call(verb, ids.clone(), |state, id| {
                let id = uuid(id);
                let Some(kept) = state.messages.get_mut(&id) else {
                    return Err(not_found(id));
                };
                if kept.state != MessageState::Prepared && kept.state != to {
                    return Err(wrong_state(id, kept.state));
                }
                kept.state = to;
                Ok(to)
            })
            .await?;
        Ok(items(ids, results))
    }
}

#[async_trait]
impl Messages for Service {
    async fn prepare(
        &self,
        request: Request<PrepareRequest>,
    ) -> Result<Response<PrepareResponse>, Status> {
        let messages = request.into_inner().messages;
        let ids = messages.iter().map(|message| message.id.clone()).collect();
        let results = self
            .call("prepare", messages, |state, message| {
                let id = uuid(&message.id);
                if let Some(kept) = state.messages.get(&id) {
                    return match kept.state {
                        MessageState::Prepared => Ok(MessageState::Prepared),
                        other => Err(wrong_state(id, other)),
                    };
                }
                let holder = state.messages.iter().find(|(_, kept)| {
                    message.key.is_some()
                        && kept.message.key == message.key
                        && kept.message.topic == message.topic
                        && kept.state != MessageState::Cancelled
                });
                if let Some((holder, kept)) = holder {
                    return Err(refusal(
                        Code::AlreadyExists,
                        "KEY_HELD",
                        *holder,
                        kept.state,
                    ));
                }
                state.prepared.push(id);
                let kept = Kept {
                    message: message.clone(),
                    state: MessageState::Prepared,
                };
                state.messages.insert(id, kept);
                Ok(MessageState::Prepared)
            })
            .await?;
        let results = items(ids, results);
        Ok(Response::new(PrepareResponse { results }))
    }

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let messages = request.into_inner().messages;
        let ids = messages.iter().map(|message| message.id.clone()).collect();
        let results = self
            .call("publish", messages, |state, message| {
                let kept = Kept {
                    message: message.clone(),
                    state: MessageState::Confirmed,
                };
                state.messages.insert(uuid(&message.id), kept);
                Ok(MessageState::Confirmed)
            })
            .await?;
        let results = items(ids, results);
        Ok(Response::new(PublishResponse { results }))
    }

    async fn confirm(
        &self,
        request: Request<ConfirmRequest>,
    ) -> Result<Response<ConfirmResponse>, Status> {
        let ids = request.into_inner().message_ids;
        let results = self.decide("confirm", ids, MessageState::Confirmed).await?;
        Ok(Response::new(ConfirmResponse { results }))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let ids = request.into_inner().message_ids;
        let results = self.decide("cancel", ids, MessageState::Cancelled).await?;
        Ok(Response::new(CancelResponse { results }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let ids = request.into_inner().message_ids;
        let found = self
            .call("get", ids.clone(), |state, id| {
                let kept = state.messages.get(&uuid(id));
                let kept = kept.ok_or_else(|| not_found(uuid(id)))?;
                Ok(MessageStatus {
                    state: kept.state.into(),
                    topic: kept.message.topic.clone(),
                    ..MessageStatus::default()
                })
            })
            .await?;
        let results = ids
            .into_iter()
            .zip(found)
            .map(|(message_id, found)| GetResult {
                message_id,
                outcome: Some(match found {
                    Ok(status) => get_result::Outcome::Status(status),
                    Err(status) => get_result::Outcome::Error(rpc_status(&status)),
                }),
            });
        Ok(Response::new(GetResponse {
            results: results.collect(),
        }))
    }
}

fn items(ids: Vec<Vec<u8>>, results: Vec<Result<MessageState, Status>>) -> Vec<ItemResult> {
    let both = ids.into_iter().zip(results);
    both.map(|(message_id, result)| ItemResult {
        message_id,
        outcome: Some(match result {
            Ok(state) => item_result::Outcome::State(state.into()),
            Err(status) => item_result::Outcome::Error(rpc_status(&status)),
        }),
    })
    .collect()
}

fn rpc_status(status: &Status) -> tonic_types::pb::Status {
    prost::Message::decode(status.details())
        .ok()
        .filter(|decoded: &tonic_types::pb::Status| decoded.code != 0)
        .unwrap_or_else(|| tonic_types::pb::Status {
            code: status.code().into(),
            message: status.message().to_owned(),
            details: Vec::new(),
        })
}

fn refusal(code: Code, reason: &str, id: Uuid, state: MessageState) -> Status {
    let name = state.as_str_name().trim_start_matches("MESSAGE_STATE_");
    let metadata = HashMap::from([
        ("message_id".to_owned(), id.to_string()),
        ("state".to_owned(), name.to_owned()),
    ]);
    Status::with_error_details(
        code,
        "refused",
        ErrorDetails::with_error_info(reason, "handfast", metadata),
    )
}

fn wrong_state(id: Uuid, state: MessageState) -> Status {
    refusal(Code::FailedPrecondition, "WRONG_STATE", id, state)
}

fn not_found(id: Uuid) -> Status {
    Status::with_error_details(
        Code::NotFound,
        "no such message",
        ErrorDetails::with_resource_info("message", id.to_string(), "", ""),
    )
}

fn uuid(bytes: &[u8]) -> Uuid {
    Uuid::from_slice(bytes).unwrap()
}
