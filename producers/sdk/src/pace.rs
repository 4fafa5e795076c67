//! How long to wait between two tries: doubling, bounded, and spread by chance.

use std::time::Duration;

use uuid::Uuid;

const FIRST_MS: u64 = 20;
const LONGEST_MS: u64 = 1_000;

/// The waits of one sequence of tries.
///
/// Chance comes from the message's id, whose random bits differ between callers: they spread,
/// and a repeated run waits the same.
#[derive(Debug)]
pub(crate) struct Pace {
    seed: u64,
    tries: u32,
}

impl Pace {
    pub(crate) fn new(id: Uuid) -> Self {
        // The low half of any version of id that is made by chance is nearly all chance.
        let (_, low) = id.as_u64_pair();
        Self {
            seed: low,
            tries: 0,
        }
    }

    /// The next wait: between half and all of a time that doubles up to a second.
    pub(crate) fn next(&mut self) -> Duration {
        let whole_ms = (FIRST_MS << self.tries.min(10)).min(LONGEST_MS);
        self.tries += 1;
        // One step of SplitMix64.
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.seed;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        Duration::from_millis(whole_ms / 2 + mixed % (whole_ms / 2 + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        let mut pace = Pace::new(Uuid::now_v7());
        let first = pace.next();
        assert!((10..=20).contains(&first.as_millis()), "{first:?}");
        let late = (0..50).map(|_| pace.next()).last().unwrap();
        assert!((500..=1_000).contains(&late.as_millis()), "{late:?}");
    }
}
