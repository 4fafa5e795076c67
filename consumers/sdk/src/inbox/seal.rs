//! Who may commit: only the SDK, and only the transaction that holds the inbox rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Keeps everybody but the SDK from committing what is written on a connection.
///
/// A database may go on after it has lost a transaction, as SQLite does. Each later statement
/// would then commit by itself, without an inbox row, and be applied again with the next copy.
#[derive(Clone, Debug, Default)]
pub struct Seal(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// The SDK is about to commit.
    opened: AtomicBool,
    /// The transaction was rolled back, and the inbox rows with it.
    lost: AtomicBool,
}

impl Seal {
    pub(crate) fn open(&self) {
        self.0.opened.store(true, Ordering::Release);
    }

    pub(crate) fn lose(&self) {
        self.0.lost.store(true, Ordering::Release);
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }

    pub(crate) fn lets_commit(&self) -> bool {
        self.0.opened.load(Ordering::Acquire) && !self.is_lost()
    }
}
