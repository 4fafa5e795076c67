//! What a consumer did between its start and its end.

/// Numbers of one run. Each delivery is counted once, by the word it was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Effects that were committed.
    pub consumed: u64,
    /// Repeats that the inbox absorbed; answered CONSUMED without the handler.
    pub duplicates: u64,
    /// Answered FAILED, time-outs and panics included.
    pub failed: u64,
    /// Answered LATER, also because the database did not take the transaction.
    pub later: u64,
    /// Answered REJECTED.
    pub rejected: u64,
    /// Answers that the service did not know a delivery for; they were dropped.
    pub no_such_delivery: u64,
    /// Answers that the service refused as malformed; they were dropped.
    pub refused: u64,
    /// Answers that were not recorded when the drain deadline came; their deliveries return.
    pub unanswered: u64,
    /// Deliveries that could not be read and were thrown away; the service sends a real one
    /// again.
    pub unreadable: u64,
    pub(crate) database_unavailable: Option<String>,
}

impl Report {
    pub(crate) fn add(&mut self, other: &Self) {
        self.consumed += other.consumed;
        self.duplicates += other.duplicates;
        self.failed += other.failed;
        self.later += other.later;
        self.rejected += other.rejected;
        self.no_such_delivery += other.no_such_delivery;
        self.refused += other.refused;
        self.unanswered += other.unanswered;
        self.unreadable += other.unreadable;
    }
}
