//! Turns answers into calls, and repeats them until the service has recorded them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use handfast_fail_points::{Point, hit};
use handfast_proto::v1::deliveries_client::DeliveriesClient;
use handfast_proto::{MAX_ITEMS, v1};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Code, Request};

use super::CALL_TIMEOUT;
use crate::backoff::Backoff;
use crate::message::{Answer, Answered};
use crate::source::reachable::Reachable;
use crate::source::{MAX_LATER, Recorded, cut};

pub(super) struct Record {
    pub(super) address: String,
    pub(super) client: DeliveriesClient<Channel>,
    pub(super) subscription: String,
    pub(super) answers: mpsc::Receiver<Answered>,
    /// Tells how many answers are done with, for credit.
    pub(super) recorded: mpsc::UnboundedSender<u32>,
    pub(super) done: Arc<Recorded>,
}

impl Record {
    /// Runs until nobody can answer any more and every answer is recorded.
    ///
    /// The call in flight is the window in which answers are collected for the next.
    pub(super) async fn run(mut self) {
        let mut waiting: VecDeque<v1::Answer> = VecDeque::new();
        let mut backoff = Backoff::new();
        let mut reachable = Reachable::new("record answers");
        let mut max_items = MAX_ITEMS;
        loop {
            if waiting.is_empty() {
                max_items = MAX_ITEMS;
                match self.answers.recv().await {
                    Some(answer) => waiting.push_back(answer.into()),
                    None => return,
                }
            }
            while waiting.len() < MAX_ITEMS
                && let Ok(answer) = self.answers.try_recv()
            {
                waiting.push_back(answer.into());
            }
            let items = waiting.len().min(max_items);
            let call = v1::AcknowledgeRequest {
                subscription: self.subscription.clone(),
                answers: waiting.range(..items).cloned().collect(),
            };
            let mut request = Request::new(call);
            request.set_timeout(CALL_TIMEOUT);
            match self.client.acknowledge(request).await {
                Ok(response) => {
                    reachable.yes(&self.address);
                    let results = response.into_inner().results;
                    let settled = settle(&mut waiting, &results, items, &self.done);
                    if settled > 0 {
                        hit(Point::CONSUMER_ANSWERED);
                        backoff.reset();
                        // Without a receiver nobody needs the credit.
                        let _ = self.recorded.send(settled);
                        continue;
                    }
                }
                // Something in this list makes the whole call unreadable. It must not hold up
                // the others for ever.
                Err(status) if status.code() == Code::InvalidArgument => {
                    if items > 1 {
                        max_items = 1;
                    } else if let Some(answer) = waiting.pop_front() {
                        refuse(&answer, status.message(), &self.done);
                        let _ = self.recorded.send(1);
                    }
                    continue;
                }
                Err(status) => reachable.no(&self.address, status.code(), status.message()),
            }
            sleep(backoff.next()).await;
        }
    }
}

/// Takes the answers that have a result off the list and says how many those were.
fn settle(
    waiting: &mut VecDeque<v1::Answer>,
    results: &[v1::AnswerResult],
    items: usize,
    done: &Recorded,
) -> u32 {
    let mut settled = 0;
    for result in results.iter().take(items) {
        // A result that belongs to another answer says nothing about this one.
        let Some(answer) = waiting.pop_front_if(|answer| answer.message_id == result.message_id)
        else {
            break;
        };
        settled += 1;
        match result.outcome() {
            v1::AnswerOutcome::Recorded | v1::AnswerOutcome::Stale => count(&done.recorded),
            v1::AnswerOutcome::NoSuchDelivery => count(&done.no_such_delivery),
            // An outcome that only a newer service knows is final too: the delivery comes
            // again if it must.
            v1::AnswerOutcome::Invalid | v1::AnswerOutcome::Unspecified => {
                let reason = result.error.as_ref().map_or("", |error| &error.message);
                refuse(&answer, reason, done);
            }
        }
    }
    settled
}

fn count(number: &AtomicU64) {
    number.fetch_add(1, Ordering::Relaxed);
}

fn refuse(answer: &v1::Answer, reason: &str, done: &Recorded) {
    count(&done.refused);
    tracing::error!(
        message.id = uuid::Uuid::from_slice(&answer.message_id)
            .unwrap_or_default()
            .to_string(),
        reason,
        "the service refused an answer; it is dropped"
    );
}

impl From<Answered> for v1::Answer {
    fn from(answered: Answered) -> Self {
        let (kind, reason, later_ms) = match answered.answer {
            Answer::Consumed => (v1::AnswerKind::Consumed, String::new(), 0),
            Answer::Failed(reason) => (v1::AnswerKind::Failed, cut(&reason).to_owned(), 0),
            Answer::Later(after) => {
                let after_ms = after.min(MAX_LATER).as_millis();
                // At most 7 days, which fits.
                (v1::AnswerKind::Later, String::new(), after_ms as i64)
            }
            Answer::Rejected(reason) => (v1::AnswerKind::Rejected, cut(&reason).to_owned(), 0),
        };
        Self {
            message_id: answered.message_id.as_bytes().to_vec(),
            generation: answered.generation,
            sent_at: answered.sent_at,
            kind: kind.into(),
            reason,
            later_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use uuid::Uuid;

    use super::*;

    fn answer(id: u128, answer: Answer) -> v1::Answer {
        Answered {
            message_id: Uuid::from_u128(id),
            generation: 3,
            sent_at: 4,
            answer,
        }
        .into()
    }

    fn result(id: u128, outcome: v1::AnswerOutcome) -> v1::AnswerResult {
        v1::AnswerResult {
            message_id: Uuid::from_u128(id).as_bytes().to_vec(),
            outcome: outcome.into(),
            error: None,
        }
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        let long = answer(1, Answer::Failed("é".repeat(600)));
        assert_eq!(long.reason.len(), 1_000);
        let odd = answer(1, Answer::Rejected(format!("a{}", "é".repeat(600))));
        assert_eq!(odd.reason.len(), 999);
    }

    #[test]
    fn later_is_at_most_seven_days() {
        let later = answer(1, Answer::Later(Duration::MAX));
        assert_eq!(later.later_ms, 7 * 24 * 3600 * 1000);
    }

    #[test]
    fn an_answer_without_a_result_stays() {
        let mut waiting: VecDeque<_> = (1..=4).map(|id| answer(id, Answer::Consumed)).collect();
        let results = [
            result(1, v1::AnswerOutcome::Recorded),
            result(2, v1::AnswerOutcome::NoSuchDelivery),
            result(9, v1::AnswerOutcome::Recorded),
        ];
        let done = Recorded::default();
        assert_eq!(settle(&mut waiting, &results, 4, &done), 2);
        assert_eq!(waiting.len(), 2);
        assert_eq!(done.recorded.into_inner(), 1);
        assert_eq!(done.no_such_delivery.into_inner(), 1);
    }
}
