//! What is compared: its sides run in turn, round by round, and each is held against the first.

use serde_json::{Map, Value, json};

use crate::Failure;
use crate::options::Options;
use crate::rounds::{Figures, head};
use crate::usage::Used;

/// What one run of one side gave.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// Messages per second, or transactions where there are no messages.
    pub(crate) per_second: f64,
    pub(crate) used: Used,
    /// The most memory that the service has had, in MiB.
    pub(crate) peak_mib: f64,
}

/// All sides, after their rounds.
#[derive(Debug)]
pub(crate) struct Sides {
    sides: Vec<Side>,
    peak_mib: f64,
}

#[derive(Debug)]
struct Side {
    name: &'static str,
    per_second: Figures,
    ratio: Figures,
    /// What one message took: microseconds of processors, bytes of WAL, and of these without
    /// full-page images.
    used: [Figures; 3],
}

/// What [`Side::used`] holds, for people and programs.
const USED: [(&str, &str); 3] = [
    ("CPU us per message", "cpu_us_per_message"),
    ("WAL bytes per message", "wal_bytes_per_message"),
    (
        "WAL bytes without images",
        "wal_bytes_per_message_without_images",
    ),
];

/// Runs each side once per round. The first round is dropped.
pub(crate) async fn alternate(
    options: &Options,
    names: &[&'static str],
    mut run: impl AsyncFnMut(usize) -> Result<Run, Failure>,
) -> Result<Sides, Failure> {
    let side = |name: &&'static str| Side {
        name,
        per_second: Figures::default(),
        ratio: Figures::default(),
        used: Default::default(),
    };
    let mut all = Sides {
        sides: names.iter().map(side).collect(),
        peak_mib: 0.0,
    };
    for round in 0..=options.rounds {
        eprintln!("round {round}: {}", names.join(", then "));
        let mut runs = Vec::new();
        for side in 0..names.len() {
            runs.push(run(side).await?);
        }
        let first = runs.first().map_or(0.0, |run| run.per_second);
        let dropped = if round == 0 { ", dropped" } else { "" };
        let said = names.iter().zip(&runs).map(|(name, run)| {
            let ratio = run.per_second / first;
            format!("{name} {:.0}/s ({ratio:.3})", run.per_second)
        });
        eprintln!(
            "round {round}{dropped}: {}",
            said.collect::<Vec<_>>().join(", ")
        );
        if round == 0 {
            continue;
        }
        for (side, run) in all.sides.iter_mut().zip(runs) {
            side.per_second.add(run.per_second);
            side.ratio.add(run.per_second / first);
            let [cpu, wal, without_images] = &mut side.used;
            cpu.add(run.used.cpu_us);
            wal.add(run.used.wal_bytes);
            if let Some(bytes) = run.used.wal_bytes_without_images {
                without_images.add(bytes);
            }
            all.peak_mib = all.peak_mib.max(run.peak_mib);
        }
    }
    Ok(all)
}

impl Sides {
    /// For people.
    pub(crate) fn print(&self) {
        println!("{}", head("per second"));
        for side in &self.sides {
            println!("{}", side.per_second.row(side.name, 0));
        }
        println!("{}", head(&format!("ratio to {}", self.first())));
        for side in self.sides.iter().skip(1) {
            println!("{}", side.ratio.row(side.name, 3));
        }
        for (index, (title, _)) in USED.iter().enumerate() {
            println!("{}", head(title));
            for side in &self.sides {
                println!("{}", side.used[index].row(side.name, 0));
            }
        }
        if self.peak_mib > 0.0 {
            println!("peak memory of the service: {:.0} MiB", self.peak_mib);
        }
    }

    /// The median of a side.
    pub(crate) fn per_second(&self, side: usize) -> f64 {
        self.sides
            .get(side)
            .map_or(0.0, |side| side.per_second.median())
    }

    fn first(&self) -> &'static str {
        self.sides.first().map_or("", |side| side.name)
    }

    /// For programs, beside what else the mode says. `ratio` is the second side's.
    pub(crate) fn json(&self, mode: &str, others: Value) -> Value {
        let mut all = Map::new();
        all.insert("mode".to_owned(), mode.into());
        if let Some(second) = self.sides.get(1) {
            all.insert("ratio_median".to_owned(), second.ratio.median().into());
            all.insert("ratio".to_owned(), second.ratio.json());
        }
        for side in &self.sides {
            all.insert(format!("{}_per_s", side.name), side.per_second.json());
        }
        let ratios = self.sides.iter().skip(1);
        let ratios: Map<_, _> = ratios
            .map(|side| (side.name.to_owned(), side.ratio.json()))
            .collect();
        all.insert("ratios".to_owned(), ratios.into());
        all.insert("peak_memory_mib".to_owned(), json!(self.peak_mib));
        let used = |side: &Side| -> Map<String, Value> {
            let figures = USED.iter().zip(&side.used);
            let figures = figures.map(|((_, key), figures)| ((*key).to_owned(), figures.json()));
            figures.collect()
        };
        let used = self
            .sides
            .iter()
            .map(|side| (side.name.to_owned(), used(side).into()));
        all.insert("used".to_owned(), used.collect::<Map<_, _>>().into());
        if let Value::Object(others) = others {
            all.extend(others);
        }
        all.into()
    }
}
