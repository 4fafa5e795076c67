//! What all modes take.

use crate::Failure;

/// What all modes take.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// A PostgreSQL database whose user may create others; without it, a throwaway server
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,

    /// A RabbitMQ; without it, a throwaway server
    #[arg(long, value_name = "URL")]
    pub(crate) broker: Option<String>,

    /// Bytes of each payload
    #[arg(long, value_name = "BYTES", default_value_t = 1024,
        value_parser = clap::value_parser!(u32).range(1..=262_144))]
    pub(crate) payload: u32,

    /// Rounds that count; one more comes first and is dropped
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,

    /// One JSON object as the last line
    #[arg(long)]
    pub(crate) json: bool,

    /// Measure also while the machine does something else
    #[arg(long)]
    pub(crate) anyway: bool,
}

/// Above this the machine does something else.
const IDLE: f64 = 0.5;

impl Options {
    /// The load average of the last minute, unless it says that something else runs here.
    pub(crate) fn load_average(&self) -> Result<f64, Failure> {
        let text = std::fs::read_to_string("/proc/loadavg")
            .map_err(Failure::of("read the load average"))?;
        let load = text.split(' ').next().and_then(|load| load.parse().ok());
        let load: f64 = load.ok_or_else(|| Failure(format!("no load average in {text:?}")))?;
        if load > IDLE && !self.anyway {
            return Err(Failure(format!(
                "the load average is {load}, above {IDLE}: something else runs here; wait, or \
                 measure with --anyway"
            )));
        }
        Ok(load)
    }
}
