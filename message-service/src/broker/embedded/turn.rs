//! What a stream does next. Pure.
//!
//! A delivery that came back unanswered may be what ended its consumer. It is sent alone: the
//! stream first drains, then carries that one, then gives the others a round, so that neither
//! kind keeps the other waiting.

/// What is true of a stream at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// Deliveries that the consumer still asks for.
    pub(super) credit: usize,
    /// Room for more unanswered deliveries.
    pub(super) room: usize,
    /// Deliveries on the stream that are not answered.
    pub(super) held: usize,
    /// The delivery that was sent alone is not answered.
    pub(super) alone_out: bool,
    /// Something is due that has to be sent alone.
    pub(super) alone_waits: bool,
    /// One was sent alone, and the others have not had their round since.
    pub(super) owes_round: bool,
    /// Nothing was sent or answered for so long that waiting for the consumer is no use.
    pub(super) quiet: bool,
    /// No more credit will come.
    pub(super) half_closed: bool,
    /// The service is stopping: no more claims.
    pub(super) draining: bool,
    /// The stream is over.
    pub(super) over: bool,
    /// Nothing was due when somebody looked a moment ago.
    pub(super) nothing_due: bool,
}

/// What a stream does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Ends.
    End,
    /// Waits for a signal, or for the time when something may be due.
    Wait,
    /// Claims this many at most of what never came back.
    Normal(usize),
    /// Claims one that came back.
    Alone,
}

impl View {
    pub(super) fn turn(&self) -> Turn {
        if self.over || (self.half_closed && self.credit == 0 && self.held == 0) {
            return Turn::End;
        }
        let most = self.credit.min(self.room);
        if self.draining || most == 0 {
            return Turn::Wait;
        }
        // A consumer that lost an answer must not stop its stream for ever, so both waits end
        // when nothing moves any more.
        if self.alone_out && !self.quiet {
            return Turn::Wait;
        }
        if self.alone_waits && !self.owes_round {
            return if self.held == 0 || self.quiet {
                Turn::Alone
            } else {
                Turn::Wait
            };
        }
        // A round that is owed also finds out whether another one waits to be sent alone.
        if self.nothing_due && !self.owes_round {
            Turn::Wait
        } else {
            Turn::Normal(most)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> View {
        View {
            credit: 10,
            room: 100,
            ..View::default()
        }
    }

    #[test]
    fn credit_is_a_claim_on_due_deliveries() {
        assert_eq!(open().turn(), Turn::Normal(10));
        assert_eq!(
            View {
                credit: 0,
                ..open()
            }
            .turn(),
            Turn::Wait
        );
    }

    #[test]
    fn a_stream_never_holds_more_than_it_has_room_for() {
        assert_eq!(View { room: 3, ..open() }.turn(), Turn::Normal(3));
        assert_eq!(View { room: 0, ..open() }.turn(), Turn::Wait);
    }

    #[test]
    fn nothing_is_claimed_while_nothing_is_due() {
        let view = View {
            nothing_due: true,
            ..open()
        };
        assert_eq!(view.turn(), Turn::Wait);
    }

    #[test]
    fn what_came_back_waits_until_the_stream_is_empty() {
        let draining = View {
            alone_waits: true,
            held: 1,
            nothing_due: true,
            ..open()
        };
        assert_eq!(draining.turn(), Turn::Wait);
        assert_eq!(
            View {
                held: 0,
                ..draining
            }
            .turn(),
            Turn::Alone
        );
    }

    #[test]
    fn nothing_goes_beside_the_one_that_was_sent_alone() {
        let view = View {
            alone_out: true,
            alone_waits: true,
            owes_round: true,
            held: 1,
            ..open()
        };
        assert_eq!(view.turn(), Turn::Wait);
    }

    #[test]
    fn one_alone_and_one_round_of_the_others_take_turns() {
        let answered = View {
            alone_waits: true,
            owes_round: true,
            nothing_due: true,
            ..open()
        };
        assert_eq!(answered.turn(), Turn::Normal(10));
        let after_the_round = View {
            owes_round: false,
            ..answered
        };
        assert_eq!(after_the_round.turn(), Turn::Alone);
    }

    #[test]
    fn a_lost_answer_does_not_stop_the_stream_for_ever() {
        let stuck = View {
            alone_out: true,
            owes_round: true,
            held: 1,
            quiet: true,
            ..open()
        };
        assert_eq!(stuck.turn(), Turn::Normal(10));
        let draining = View {
            alone_waits: true,
            held: 1,
            quiet: true,
            ..open()
        };
        assert_eq!(draining.turn(), Turn::Alone);
    }

    #[test]
    fn a_half_closed_stream_ends_when_all_is_used_up_and_answered() {
        let half = View {
            half_closed: true,
            ..open()
        };
        assert_eq!(half.turn(), Turn::Normal(10));
        let used_up = View { credit: 0, ..half };
        assert_eq!(View { held: 1, ..used_up }.turn(), Turn::Wait);
        assert_eq!(used_up.turn(), Turn::End);
    }

    #[test]
    fn a_service_that_stops_claims_nothing_and_keeps_streams_open_for_answers() {
        let view = View {
            draining: true,
            held: 1,
            ..open()
        };
        assert_eq!(view.turn(), Turn::Wait);
        assert_eq!(View { over: true, ..view }.turn(), Turn::End);
    }
}
