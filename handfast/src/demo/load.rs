//! The merchants: they have every order paid, and repeat what is not answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use payment::client::{GetPaymentRequest, PayRequest, PaymentClient, PaymentStatus};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::Error;
use super::home::Home;
use super::kill::Stage;
use super::party::PAY_DEADLINE_MS;
use super::plan::{Order, Plan, RequestKind};
use super::tally::Tally;

/// Requests that are under way at the same time; one may be two calls.
const CONCURRENT_REQUESTS: usize = 32;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longer than payment waits before it says PROCESSING.
const CALL_TIMEOUT: Duration = Duration::from_millis(PAY_DEADLINE_MS + 2_000);
/// How long a merchant waits before it asks again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A final answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The order is paid.
    Paid,
    /// The order is not, and will not be.
    Refused,
}

/// What the merchants were told. An order has one answer, however often it was asked for.
#[derive(Debug)]
pub(crate) struct Answers {
    by_order: Vec<AtomicU8>,
}

const NO_ANSWER: u8 = 0;
const PAID: u8 = 1;
const REFUSED: u8 = 2;
const CONTRADICTORY: u8 = 3;

impl Answers {
    /// None yet.
    pub(crate) fn none(plan: &Plan) -> Self {
        let by_order = plan.orders.iter();
        Self {
            by_order: by_order.map(|_| AtomicU8::new(NO_ANSWER)).collect(),
        }
    }

    /// Keeps an answer; true for the first one of its order.
    fn keep(&self, order: usize, answer: Answer) -> bool {
        let code = match answer {
            Answer::Paid => PAID,
            Answer::Refused => REFUSED,
        };
        let slot = &self.by_order[order];
        match slot.compare_exchange(NO_ANSWER, code, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(kept) => {
                if kept != code {
                    slot.store(CONTRADICTORY, Ordering::SeqCst);
                }
                false
            }
        }
    }

    /// What is wrong with the answer to an order, if anything is.
    pub(crate) fn complaint(&self, index: usize, order: &Order) -> Option<&'static str> {
        let answer = self.by_order[index].load(Ordering::SeqCst);
        match (answer, order.is_too_much()) {
            (PAID, false) | (REFUSED, true) => None,
            (NO_ANSWER, _) => Some("was never answered"),
            (PAID, true) => Some("was paid though the user has too little"),
            (REFUSED, false) => Some("was refused though the user has enough"),
            _ => Some("was answered differently when it was asked for again"),
        }
    }
}

/// What every merchant needs.
struct Market {
    plan: Arc<Plan>,
    answers: Arc<Answers>,
    tally: Arc<Tally>,
    stage: Arc<watch::Sender<Stage>>,
    next: AtomicUsize,
}

/// Sends every request of the plan until it is answered for good.
pub(crate) async fn run(
    home: &Home,
    plan: &Arc<Plan>,
    answers: &Arc<Answers>,
    tally: &Arc<Tally>,
    stage: &Arc<watch::Sender<Stage>>,
) -> Result<(), Error> {
    let address = format!("http://{}", home.payment());
    let endpoint = Endpoint::from_shared(address).map_err(Error::Client)?;
    let channel = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .connect_lazy();
    let market = Arc::new(Market {
        plan: Arc::clone(plan),
        answers: Arc::clone(answers),
        tally: Arc::clone(tally),
        stage: Arc::clone(stage),
        next: AtomicUsize::new(0),
    });
    let mut merchants = JoinSet::new();
    for _ in 0..CONCURRENT_REQUESTS {
        let client = PaymentClient::new(channel.clone());
        merchants.spawn(Arc::clone(&market).sell(client));
    }
    while let Some(ended) = merchants.join_next().await {
        ended.map_err(|error| Error::Task(error.to_string()))??;
    }
    Ok(())
}

impl Market {
    /// One merchant takes the next request, and the next.
    async fn sell(self: Arc<Self>, client: PaymentClient<Channel>) -> Result<(), Error> {
        loop {
            let next = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(request) = self.plan.requests.get(next) else {
                return Ok(());
            };
            let order = &self.plan.orders[request.order];
            self.tally.in_flight.fetch_add(1, Ordering::Relaxed);
            match request.kind {
                RequestKind::First | RequestKind::Again => {
                    let answer = self.ask(&client, order).await?;
                    self.note(request.order, answer);
                }
                RequestKind::FirstTwice => {
                    let (one, other) =
                        tokio::join!(self.ask(&client, order), self.ask(&client, order));
                    self.note(request.order, one?);
                    self.note(request.order, other?);
                }
            }
            self.tally.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn note(&self, order: usize, answer: Answer) {
        if !self.answers.keep(order, answer) {
            return;
        }
        let count = match answer {
            Answer::Paid => &self.tally.paid,
            Answer::Refused => &self.tally.refused,
        };
        count.fetch_add(1, Ordering::Relaxed);
        let settled = self.tally.settled();
        self.stage
            .send_modify(|stage| stage.settled = stage.settled.max(settled));
    }

    /// Asks until the answer is final. A call that ends without an answer says nothing about
    /// the payment, so it is repeated as it was; while payment works on it, it is looked at.
    async fn ask(&self, client: &PaymentClient<Channel>, order: &Order) -> Result<Answer, Error> {
        let mut is_known = false;
        loop {
            let call = async {
                if is_known {
                    look(client.clone(), order).await
                } else {
                    pay(client.clone(), order).await
                }
            };
            match timeout(CALL_TIMEOUT, call).await {
                Ok(Ok(PaymentStatus::Paid)) => return Ok(Answer::Paid),
                Ok(Ok(PaymentStatus::Refused)) => return Ok(Answer::Refused),
                Ok(Ok(PaymentStatus::Processing)) => is_known = true,
                Ok(Ok(PaymentStatus::Unspecified)) | Err(_) => is_known = false,
                Ok(Err(status)) if is_final(&status) => {
                    return Err(Error::Request {
                        order: format!("{}/{}", order.caller(), order.order_id()),
                        status: Box::new(status),
                    });
                }
                Ok(Err(_)) => is_known = false,
            }
            self.tally.calls_repeated.fetch_add(1, Ordering::Relaxed);
            sleep(ASK_AGAIN).await;
        }
    }
}

async fn pay(mut client: PaymentClient<Channel>, order: &Order) -> Result<PaymentStatus, Status> {
    let request = PayRequest {
        caller: order.caller(),
        order_id: order.order_id(),
        user: order.user(),
        amount: order.amount,
    };
    Ok(client.pay(request).await?.into_inner().status())
}

async fn look(mut client: PaymentClient<Channel>, order: &Order) -> Result<PaymentStatus, Status> {
    let request = GetPaymentRequest {
        caller: order.caller(),
        order_id: order.order_id(),
    };
    Ok(client.get_payment(request).await?.into_inner().status())
}

/// True if the same call would be refused again, which none of ours should be.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_one_answer_and_a_second_one_is_noticed() {
        let plan = Plan::draw(1, 100, false);
        let answers = Answers::none(&plan);
        let index = plan.orders.iter().position(|order| !order.is_too_much());
        let index = index.unwrap();
        let order = &plan.orders[index];
        assert!(answers.complaint(index, order).is_some());
        assert!(answers.keep(index, Answer::Paid));
        assert!(!answers.keep(index, Answer::Paid));
        assert_eq!(answers.complaint(index, order), None);
        assert!(!answers.keep(index, Answer::Refused));
        let complaint = answers.complaint(index, order).unwrap();
        assert!(complaint.contains("differently"), "{complaint}");
    }
}
