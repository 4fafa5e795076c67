//! Who calls: merchants that ask payment, and producers and consumers that speak the contract
//! by hand.

use std::cell::Cell;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use handfast_proto::v1::item_result::Outcome;
use handfast_proto::v1::messages_client::MessagesClient;
use handfast_proto::v1::{
    AcknowledgeRequest, Answer, AnswerKind, AnswerOutcome, CancelRequest, ConfirmRequest,
    ConsumeRequest, Delivery, GetRequest, ItemResult, MessageState, MessageStatus, NewMessage,
    PrepareRequest, PublishRequest, consume_request, get_result,
};
use payment::client::{
    GetPaymentRequest, GetPaymentResponse, PayRequest, PayResponse, PaymentClient, PaymentStatus,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

use crate::wait::eventually;
use crate::world::{POOR, USER};

/// The merchant of all orders.
pub const SHOP: &str = "shop";
/// A merchant gives up after this long.
const PATIENCE: Duration = Duration::from_secs(40);
/// Orders that are paid at the same time.
const CONCURRENT: usize = 8;

/// What a merchant asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The merchant's number.
    pub id: String,
    /// Who pays.
    pub user: String,
    /// In minor units.
    pub amount: i64,
}

impl Order {
    /// An order that can be paid.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            user: USER.to_owned(),
            amount: 250,
        }
    }

    /// An order whose user has nothing.
    pub fn of_a_poor_user(id: impl Into<String>) -> Self {
        Self {
            user: POOR.to_owned(),
            ..Self::new(id)
        }
    }

    /// The same order for another amount.
    #[must_use]
    pub fn for_amount(mut self, amount: i64) -> Self {
        self.amount = amount;
        self
    }
}

/// Orders `a-1` … `a-n`, of which every fifth cannot be paid.
pub fn orders(prefix: &str, count: usize) -> Vec<Order> {
    let order = |n| match n % 5 {
        4 => Order::of_a_poor_user(format!("{prefix}-{n}")),
        _ => Order::new(format!("{prefix}-{n}")),
    };
    (0..count).map(order).collect()
}

/// A merchant that asks payment.
#[derive(Clone, Debug)]
pub struct Payments {
    client: PaymentClient<Channel>,
}

impl Payments {
    /// Asks the payment behind this connection.
    pub fn at(channel: Channel) -> Self {
        Self {
            client: PaymentClient::new(channel),
        }
    }

    /// Asks once.
    pub async fn asks(&self, order: &Order) -> Result<PayResponse, Status> {
        let request = PayRequest {
            caller: SHOP.to_owned(),
            order_id: order.id.clone(),
            user: order.user.clone(),
            amount: order.amount,
        };
        let reply = self.client.clone().pay(request).await?;
        Ok(reply.into_inner())
    }

    /// Asks what became of a payment.
    pub async fn looks_up(&self, order: &Order) -> Result<GetPaymentResponse, Status> {
        let request = GetPaymentRequest {
            caller: SHOP.to_owned(),
            order_id: order.id.clone(),
        };
        let reply = self.client.clone().get_payment(request).await?;
        Ok(reply.into_inner())
    }

    /// Asks until it knows: PAID or REFUSED.
    pub async fn pays(&self, order: &Order) -> PaymentStatus {
        eventually(
            format!("order {} is decided", order.id),
            PATIENCE,
            async || match self.asks(order).await {
                Ok(reply) => match reply.status() {
                    status @ (PaymentStatus::Paid | PaymentStatus::Refused) => Ok(status),
                    other => Err(format!("{other:?}")),
                },
                Err(status) => {
                    assert!(
                        may_pass(status.code()),
                        "order {}: {status}, which is no answer to a merchant",
                        order.id
                    );
                    Err(status.to_string())
                }
            },
        )
        .await
    }

    /// Pays all of them, some at a time, and returns how many were paid and refused.
    pub async fn pay_all(&self, orders: &[Order]) -> (usize, usize) {
        let statuses: Vec<_> = stream::iter(orders.to_vec())
            .map(|order| {
                let payments = self.clone();
                async move { payments.pays(&order).await }
            })
            .buffer_unordered(CONCURRENT)
            .collect()
            .await;
        let paid = statuses.iter().filter(|s| **s == PaymentStatus::Paid);
        let paid = paid.count();
        (paid, statuses.len() - paid)
    }
}

/// Orders between two looks at whether the load is over.
const ROUND: usize = 50;

impl Payments {
    /// Pays until the load is over, and returns how many orders were asked for; every fifth is
    /// refused.
    pub async fn pay_until(&self, over: &Cell<bool>) -> usize {
        let mut rounds = 0;
        while !over.get() {
            let orders = orders(&format!("a{rounds}"), ROUND);
            let paid = self.pay_all(&orders).await;
            assert_eq!(paid, (ROUND * 4 / 5, ROUND / 5));
            rounds += 1;
        }
        rounds * ROUND
    }
}

/// Whether a call may succeed when it is repeated.
fn may_pass(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::Internal
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
    )
}

/// A message without a key, with a payload that names its id.
pub fn message(topic: &str) -> NewMessage {
    let id = Uuid::now_v7();
    NewMessage {
        id: id.as_bytes().to_vec(),
        topic: topic.to_owned(),
        content_type: "text/plain".to_owned(),
        payload: id.to_string().into_bytes().into(),
        ..NewMessage::default()
    }
}

/// The id of a message as text.
pub fn name_of(id: &[u8]) -> String {
    Uuid::from_slice(id).map_or_else(|_| format!("{id:?}"), |id| id.to_string())
}

/// How one item of a list was refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// Of the item.
    pub code: Code,
    /// For people.
    pub message: String,
}

/// A producer that speaks the contract by hand, one item per call. A call that is not
/// answered panics unless the method says otherwise.
#[derive(Clone, Debug)]
pub struct Raw {
    client: MessagesClient<Channel>,
    producer: String,
}

impl Raw {
    pub(crate) fn new(client: MessagesClient<Channel>, producer: &str) -> Self {
        Self {
            client,
            producer: producer.to_owned(),
        }
    }

    /// Prepares; Err is a call that was not answered.
    pub async fn try_prepare(
        &self,
        message: &NewMessage,
    ) -> Result<Result<MessageState, Refused>, Status> {
        let request = PrepareRequest {
            producer: self.producer.clone(),
            messages: vec![message.clone()],
        };
        let reply = self.client.clone().prepare(request).await?;
        Ok(only(reply.into_inner().results))
    }

    /// Prepares.
    pub async fn prepare(&self, message: &NewMessage) -> Result<MessageState, Refused> {
        self.try_prepare(message).await.expect("an answer")
    }

    /// Publishes; Err is a call that was not answered.
    pub async fn try_publish(
        &self,
        message: &NewMessage,
    ) -> Result<Result<MessageState, Refused>, Status> {
        let request = PublishRequest {
            producer: self.producer.clone(),
            messages: vec![message.clone()],
        };
        let reply = self.client.clone().publish(request).await?;
        Ok(only(reply.into_inner().results))
    }

    /// Publishes, and again until it is answered.
    pub async fn publish(&self, message: &NewMessage) {
        eventually("a publish is answered", PATIENCE, async || {
            match self.try_publish(message).await {
                Ok(Ok(MessageState::Confirmed)) => Ok(()),
                Ok(other) => panic!("publish: {other:?}"),
                Err(status) => Err(status.to_string()),
            }
        })
        .await;
    }

    /// Confirms.
    pub async fn confirm(&self, id: &[u8]) -> Result<MessageState, Refused> {
        let request = ConfirmRequest {
            producer: self.producer.clone(),
            message_ids: vec![id.to_vec()],
        };
        let reply = self.client.clone().confirm(request).await;
        only(reply.expect("an answer").into_inner().results)
    }

    /// Cancels; Err is a call that was not answered.
    pub async fn try_cancel(&self, id: &[u8]) -> Result<Result<MessageState, Refused>, Status> {
        let request = CancelRequest {
            producer: self.producer.clone(),
            message_ids: vec![id.to_vec()],
        };
        let reply = self.client.clone().cancel(request).await?;
        Ok(only(reply.into_inner().results))
    }

    /// Cancels.
    pub async fn cancel(&self, id: &[u8]) -> Result<MessageState, Refused> {
        self.try_cancel(id).await.expect("an answer")
    }

    /// What became of a message, if the service knows it.
    pub async fn get(&self, id: &[u8]) -> Option<MessageStatus> {
        let request = GetRequest {
            producer: self.producer.clone(),
            message_ids: vec![id.to_vec()],
        };
        let reply = self.client.clone().get(request).await.expect("an answer");
        match reply.into_inner().results.remove(0).outcome? {
            get_result::Outcome::Status(status) => Some(status),
            get_result::Outcome::Error(_) => None,
        }
    }
}

fn only(mut results: Vec<ItemResult>) -> Result<MessageState, Refused> {
    assert_eq!(results.len(), 1, "one item, one result");
    match results.remove(0).outcome.expect("an outcome") {
        Outcome::State(state) => Ok(MessageState::try_from(state).expect("a known state")),
        Outcome::Error(error) => Err(Refused {
            code: Code::from_i32(error.code),
            message: error.message,
        }),
    }
}

/// A consumer that speaks the contract by hand: it gets what its credit allows and answers
/// only what it is told to.
#[derive(Debug)]
pub struct RawConsumer {
    client: DeliveriesClient<Channel>,
    subscription: String,
    credit: mpsc::Sender<ConsumeRequest>,
    stream: Streaming<handfast_proto::v1::ConsumeResponse>,
    waiting: Vec<Delivery>,
}

impl RawConsumer {
    /// Opens a stream with this credit; repeated until the service knows the subscription.
    pub async fn open(
        client: DeliveriesClient<Channel>,
        topic: &str,
        subscription: &str,
        credit: u32,
    ) -> Self {
        eventually(
            format!("a stream of {subscription}"),
            PATIENCE,
            async || {
                let (sender, receiver) = mpsc::channel(16);
                for kind in [
                    consume_request::Kind::Open(consume_request::Open {
                        topic: topic.to_owned(),
                        subscription: subscription.to_owned(),
                        consumer: "by-hand".to_owned(),
                    }),
                    consume_request::Kind::Credit(credit),
                ] {
                    let request = ConsumeRequest { kind: Some(kind) };
                    sender.send(request).await.expect("room for two");
                }
                let opened = client.clone().consume(ReceiverStream::new(receiver)).await;
                let stream = opened.map_err(|status| status.to_string())?.into_inner();
                Ok(Self {
                    client: client.clone(),
                    subscription: subscription.to_owned(),
                    credit: sender,
                    stream,
                    waiting: Vec::new(),
                })
            },
        )
        .await
    }

    /// Grants more credit.
    pub async fn grant(&self, credit: u32) {
        let kind = Some(consume_request::Kind::Credit(credit));
        let granted = self.credit.send(ConsumeRequest { kind }).await;
        granted.expect("the stream is open");
    }

    /// The next delivery, if it comes within this time.
    pub async fn next_within(&mut self, time: Duration) -> Option<Delivery> {
        let ends = tokio::time::Instant::now() + time;
        while self.waiting.is_empty() {
            match tokio::time::timeout_at(ends, self.stream.message()).await {
                Ok(Ok(Some(batch))) => self.waiting = batch.deliveries,
                Ok(Ok(None) | Err(_)) | Err(_) => return None,
            }
        }
        Some(self.waiting.remove(0))
    }

    /// The next delivery.
    pub async fn next(&mut self) -> Delivery {
        let next = self.next_within(Duration::from_secs(15)).await;
        next.unwrap_or_else(|| panic!("{} got nothing", self.subscription))
    }

    /// How the stream ended, once it has.
    pub async fn ended(&mut self, deadline: Duration) -> Result<(), Status> {
        loop {
            match tokio::time::timeout(deadline, self.stream.message()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(status)) => return Err(status),
                Err(_) => panic!("the stream did not end within {deadline:?}"),
            }
        }
    }

    /// Answers a delivery.
    pub async fn answer(
        &self,
        delivery: &Delivery,
        kind: AnswerKind,
        reason: &str,
    ) -> AnswerOutcome {
        let request = AcknowledgeRequest {
            subscription: self.subscription.clone(),
            answers: vec![Answer {
                message_id: delivery.message_id.clone(),
                generation: delivery.generation,
                sent_at: delivery.sent_at,
                kind: kind.into(),
                reason: reason.to_owned(),
                later_ms: 0,
            }],
        };
        let reply = self.client.clone().acknowledge(request).await;
        reply.expect("an answer").into_inner().results[0].outcome()
    }

    /// Answers CONSUMED.
    pub async fn consumed(&self, delivery: &Delivery) {
        let outcome = self.answer(delivery, AnswerKind::Consumed, "").await;
        assert_eq!(outcome, AnswerOutcome::Recorded);
    }
}
