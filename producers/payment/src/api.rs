//! The gRPC edge: parse, ask, answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, async_trait};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::input;
use crate::pay::{PayError, Payments};
use crate::store::{Order, Records, State};
use crate::v1::payment_server::Payment as PaymentApi;
use crate::v1::{GetPaymentRequest, GetPaymentResponse, PayRequest, PayResponse, PaymentStatus};

/// Payments that are worked on at one moment; beyond it a call is told to come again.
const MAX_IN_FLIGHT: usize = 512;
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The service `payment.v1.Payment`.
#[derive(Debug)]
pub struct Api<S> {
    payments: Payments<S>,
    pay_deadline: Duration,
    in_flight: Arc<Semaphore>,
}

impl<S> Api<S> {
    /// Answers PROCESSING where a payment takes longer than `pay_deadline`.
    pub fn new(payments: Payments<S>, pay_deadline: Duration) -> Self {
        Self {
            payments,
            pay_deadline,
            in_flight: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
        }
    }
}

#[async_trait]
impl<S: Records> PaymentApi for Api<S> {
    async fn pay(&self, request: Request<PayRequest>) -> Result<Response<PayResponse>, Status> {
        let PayRequest {
            caller,
            order_id,
            user,
            amount,
        } = request.into_inner();
        let order = input::order(caller, order_id)?;
        input::user_and_amount(&user, amount)?;
        let Ok(permit) = Arc::clone(&self.in_flight).try_acquire_owned() else {
            return Err(too_busy());
        };
        let payments = self.payments.clone();
        // A task of its own: this future is dropped when the caller hangs up, and a payment
        // is not stopped half-way.
        let work = self.payments.tasks.spawn(async move {
            let _permit = permit;
            let payment = payments.accept(&order, &user, amount).await?;
            match payment.state {
                State::Paying => Ok(payments.finish(&order).await?),
                decided => Ok::<_, PayError>(decided),
            }
        });
        let state = match timeout(self.pay_deadline, work).await {
            Ok(Ok(result)) => result.map_err(|error| refused(&error))?,
            Ok(Err(stopped)) => {
                tracing::error!(error = %stopped, "a payment's task has failed");
                State::Paying
            }
            Err(_) => State::Paying,
        };
        let (status, reason) = answer(state);
        Ok(Response::new(PayResponse {
            status: status.into(),
            reason,
        }))
    }

    async fn get_payment(
        &self,
        request: Request<GetPaymentRequest>,
    ) -> Result<Response<GetPaymentResponse>, Status> {
        let GetPaymentRequest { caller, order_id } = request.into_inner();
        let order = input::order(caller, order_id)?;
        let found = self.payments.store.find(&order).await;
        let found = found.map_err(|error| refused(&PayError::Database(error)))?;
        let Some(payment) = found else {
            return Err(not_found(&order));
        };
        let (status, reason) = answer(payment.state);
        Ok(Response::new(GetPaymentResponse {
            status: status.into(),
            reason,
            user: payment.user,
            amount: payment.amount,
        }))
    }
}

fn answer(state: State) -> (PaymentStatus, String) {
    match state {
        State::Paying => (PaymentStatus::Processing, String::new()),
        State::Paid => (PaymentStatus::Paid, String::new()),
        State::Refused(reason) => (PaymentStatus::Refused, reason),
    }
}

/// The one place where an error becomes a status.
fn refused(error: &PayError) -> Status {
    match error {
        PayError::Differs { .. } => Status::with_error_details(
            Code::AlreadyExists,
            error.to_string(),
            ErrorDetails::with_error_info("CONTENT_DIFFERS", "payment", HashMap::new()),
        ),
        PayError::Database(cause) => {
            tracing::error!(error = %cause, "the database did not answer");
            Status::with_error_details(
                Code::Unavailable,
                "the payment cannot be looked at; ask again",
                ErrorDetails::with_retry_info(Some(RETRY_AFTER)),
            )
        }
    }
}

fn not_found(order: &Order) -> Status {
    let Order { caller, order_id } = order;
    Status::with_error_details(
        Code::NotFound,
        format!("there is no payment for order `{order_id}` of `{caller}`"),
        ErrorDetails::with_resource_info("payment", order_id, caller, ""),
    )
}

fn too_busy() -> Status {
    Status::with_error_details(
        Code::ResourceExhausted,
        format!("{MAX_IN_FLIGHT} payments are in flight"),
        ErrorDetails::with_retry_info(Some(RETRY_AFTER)),
    )
}
