//! Time on PostgreSQL: the database's clock, which all replicas share.
//!
//! What is written takes its time from `clock_timestamp()` in the statement itself. [`StoreClock`]
//! only estimates that clock without asking: by how far it was ahead of this process's monotonic
//! clock when last asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::PgInterval;
use sqlx::postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Encode, Postgres, Type};

use super::rows::at;
use super::session::Session;
use crate::clock::Clock;
use crate::message::Timestamp;

/// An estimate of the database's clock.
pub(super) struct StoreClock {
    clock: Arc<dyn Clock>,
    /// What to add to the monotonic clock, in microseconds.
    ahead_micros: AtomicI64,
}

impl StoreClock {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            ahead_micros: AtomicI64::new(0),
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        let ahead = self.ahead_micros.load(Ordering::Relaxed);
        Timestamp::from_micros(ahead.saturating_add(micros(self.clock.monotonic())))
    }

    /// Asks the database. Its answer is of some moment between question and reply: the middle
    /// is wrong by half of that at most.
    pub(super) async fn refresh(&self, db: &mut Session) -> Result<(), sqlx::Error> {
        let asked = self.clock.monotonic();
        let rows = db.fetch(NOW, |query| query).await?;
        let replied = self.clock.monotonic();
        let Some(row) = rows.first() else {
            return Err(sqlx::Error::RowNotFound);
        };
        let middle = asked + replied.saturating_sub(asked) / 2;
        let ahead = at(row, "now")?.as_micros().saturating_sub(micros(middle));
        self.ahead_micros.store(ahead, Ordering::Relaxed);
        Ok(())
    }
}

const NOW: &str = "-- what time is it\nSELECT clock_timestamp() AS now";

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// Seconds from 1970, where this program counts from, to 2000, where PostgreSQL does.
const EPOCH_MICROS: i64 = 946_684_800 * 1_000_000;
/// PostgreSQL's time ends with the year 294276; what is later is infinity.
const LAST_MICROS: i64 = 9_223_371_331_200_000_000 - 1;
/// And it begins in 4714 BC; what is earlier is minus infinity.
const FIRST_MICROS: i64 = -211_813_488_000_000_000;

/// A [`Timestamp`] as the database's `timestamptz`.
#[derive(Clone, Copy, Debug)]
pub(super) struct At(pub(super) Timestamp);

impl Type<Postgres> for At {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("timestamptz")
    }
}

impl PgHasArrayType for At {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("_timestamptz")
    }
}

impl Encode<'_, Postgres> for At {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        let micros = match self.0.as_micros().saturating_sub(EPOCH_MICROS) {
            late if late > LAST_MICROS => i64::MAX,
            early if early < FIRST_MICROS => i64::MIN,
            micros => micros,
        };
        Encode::<Postgres>::encode_by_ref(&micros, buffer)
    }
}

impl<'r> Decode<'r, Postgres> for At {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        if value.format() != PgValueFormat::Binary {
            return Err("a time in text".into());
        }
        let micros = i64::from_be_bytes(value.as_bytes()?.try_into()?);
        Ok(Self(Timestamp::from_micros(
            micros.saturating_add(EPOCH_MICROS),
        )))
    }
}

/// Longer than anything that is scheduled, and short enough to be added to any time.
const LONGEST_SPAN: Duration = Duration::from_secs(1_000 * 366 * 86_400);

/// A duration as the database's `interval`.
pub(super) fn span(span: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: micros(span.min(LONGEST_SPAN)),
    }
}
