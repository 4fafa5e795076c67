//! How long an answer waits for others before it is published.
//!
//! Each message of answers costs RabbitMQ and the service a write of their own. So where answers
//! come one after the other, they wait for each other a little. Where none comes, because
//! deliveries are rare or because the next one waits for this answer, nobody waits for long.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, timeout_at};

/// How long an answer waits.
const WAIT: Duration = Duration::from_millis(20);
/// After a wait that was for nothing, so many messages of answers go without one. More would be
/// late when a load begins; fewer would be felt where the next delivery waits for an answer.
const WITHOUT: u32 = 100;

pub(super) struct Company {
    /// So many answers do not wait: their deliveries take too much of the prefetch.
    enough: usize,
    /// How many deliveries are here. While some of them are not answered, others may come.
    held: Arc<AtomicUsize>,
    /// Messages of answers that do not wait for more than what is here.
    without: u32,
}

impl Company {
    pub(super) fn new(enough: usize, held: Arc<AtomicUsize>) -> Self {
        Self {
            enough,
            held,
            without: 0,
        }
    }

    /// Takes answers until there are enough, or the first has waited for long, or no other is to
    /// be expected. One at least is here already.
    pub(super) async fn collect<T>(
        &mut self,
        answers: &mut Receiver<T>,
        waiting: &mut VecDeque<T>,
    ) {
        let until = Instant::now() + WAIT;
        let mut more_came = false;
        while waiting.len() < self.enough {
            let all_answered = waiting.len() >= self.held.load(Ordering::Relaxed);
            if all_answered && self.without > 0 {
                self.without -= 1;
                return;
            }
            match timeout_at(until, answers.recv()).await {
                Ok(Some(answer)) => {
                    waiting.push_back(answer);
                    more_came |= all_answered;
                }
                Ok(None) => return,
                Err(_) => {
                    if all_answered && !more_came {
                        self.without = WITHOUT;
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::sync::mpsc;

    use super::*;

    const ENOUGH: usize = 4;

    /// One answer is there, while so many deliveries are here.
    fn company(held: usize) -> (Company, VecDeque<u32>) {
        let held = Arc::new(AtomicUsize::new(held));
        (Company::new(ENOUGH, held), VecDeque::from([0]))
    }

    #[tokio::test]
    async fn where_answers_come_one_after_the_other_they_go_together() {
        let (answers_in, mut answers) = mpsc::channel(9);
        for answer in 1..9 {
            answers_in.send(answer).await.unwrap();
        }
        let (mut company, mut waiting) = company(1);
        company.collect(&mut answers, &mut waiting).await;
        assert_eq!(waiting.len(), ENOUGH);
    }

    #[tokio::test]
    async fn after_a_wait_for_nothing_many_go_without_one() {
        let (_answers_in, mut answers) = mpsc::channel(9);
        let (mut company, mut waiting) = company(1);
        for _ in 0..2 {
            let began = Instant::now();
            company.collect(&mut answers, &mut waiting).await;
            assert!(began.elapsed() >= WAIT);
            for _ in 0..WITHOUT {
                let at_once = company.collect(&mut answers, &mut waiting).now_or_never();
                assert!(at_once.is_some());
            }
        }
    }

    #[tokio::test]
    async fn a_wait_that_brought_some_is_not_given_up() {
        let (answers_in, mut answers) = mpsc::channel(9);
        let (mut company, mut waiting) = company(1);
        answers_in.send(1).await.unwrap();
        company.collect(&mut answers, &mut waiting).await;
        waiting.drain(1..);
        let at_once = company.collect(&mut answers, &mut waiting).now_or_never();
        assert!(at_once.is_none());
    }

    #[tokio::test]
    async fn what_is_here_unanswered_is_waited_for_all_the_same() {
        let (answers_in, mut answers) = mpsc::channel(9);
        let (mut company, mut waiting) = company(2);
        company.without = 1;
        let sent = async { answers_in.send(1).await.unwrap() };
        tokio::join!(company.collect(&mut answers, &mut waiting), sent);
        assert_eq!(waiting.len(), 2);
    }

    #[tokio::test]
    async fn enough_do_not_wait() {
        let (_answers_in, mut answers) = mpsc::channel(9);
        let (mut company, mut waiting) = company(9);
        waiting.extend([1, 2, 3]);
        let at_once = company.collect(&mut answers, &mut waiting).now_or_never();
        assert!(at_once.is_some());
    }
}
