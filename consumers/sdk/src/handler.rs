//! The two traits a consumer implements.
//!
//! They are traits, not closures, because a future that borrows the transaction and must be
//! `Send` cannot be named by an async closure's bound. An `async fn` in the `impl` is enough.

use crate::inbox::{InboxDatabase, Tx};
use crate::message::{Answer, Delivered};

/// Applies one message in one transaction.
///
/// It may be called again for a message whose effect was rolled back, never for one whose
/// effect was committed. What it does outside of the transaction may therefore happen again.
pub trait Handler<D: InboxDatabase = sqlx::Sqlite>: Send + Sync + 'static {
    /// Applies `message` within `tx`. The future is dropped when the handler's time-out ends.
    fn handle(&self, tx: &mut Tx<D>, message: &Delivered) -> impl Future<Output = Answer> + Send;
}

/// Applies several messages in one transaction, which is several times faster.
pub trait BatchHandler<D: InboxDatabase = sqlx::Sqlite>: Send + Sync + 'static {
    /// Applies `messages`, all new and all different, within `tx`, and says one word for each,
    /// in order. If any is not [`Answer::Consumed`], or their number is wrong, all of it is
    /// rolled back and each message is tried again by itself.
    fn handle_batch(
        &self,
        tx: &mut Tx<D>,
        messages: &[Delivered],
    ) -> impl Future<Output = Vec<Answer>> + Send;
}

/// A [`Handler`] as a [`BatchHandler`] whose batches have one message.
pub(crate) struct OneByOne<H>(pub(crate) H);

impl<D: InboxDatabase, H: Handler<D>> BatchHandler<D> for OneByOne<H> {
    async fn handle_batch(&self, tx: &mut Tx<D>, messages: &[Delivered]) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(messages.len());
        for message in messages {
            answers.push(self.0.handle(tx, message).await);
        }
        answers
    }
}
