//! The rules of `[server]`.

use std::net::SocketAddr;
use std::time::Duration;

use super::engines::{self, Engines};
use super::place::{Place, Wrong};
use super::settings::{Settings, Values};
use crate::message::limits::{HARD_PAYLOAD_BYTES, Limits};

/// No span of milliseconds may be longer: one day.
const MOST_MS: u64 = 24 * 3600 * 1000;
/// No span of seconds may be longer: ten years.
const MOST_S: u64 = 10 * 365 * 24 * 3600;
/// More calls than this are not held, whatever the machine has: half a GiB.
const MOST_INFLIGHT_BYTES: u64 = 512 * 1024 * 1024;
/// No number of bytes or messages may be larger: what a signed column can hold, with room.
const MOST_COUNT: u64 = 1 << 60;

/// The longest name of a deployment.
const MOST_DEPLOYMENT_BYTES: usize = 50;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What this process is told, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Where to serve; loopback, unless `insecure_listen`.
    pub listen: SocketAddr,
    /// What keeps messages and what carries them.
    pub engines: Engines,
    /// Whether an address that is not loopback is served although nobody is authenticated.
    pub insecure_listen: bool,
    /// Whether reflection is served on an address that is not loopback.
    pub reflection: bool,
    /// From SIGTERM to the end of the last call.
    pub shutdown_deadline: Duration,
    /// The limits of a message.
    pub limits: Limits,
    /// How many bytes of calls are held at the same time.
    pub inflight_bytes: usize,
    /// PREPARED messages of one producer.
    pub max_undecided: u64,
    /// Bytes of the store beyond which prepare and publish are refused.
    pub max_backlog_bytes: u64,
    /// How long finished messages are kept.
    pub retention: Duration,
    /// How long one body bucket is the newest.
    pub bucket: Duration,
    /// How long a send may take; below `lease`.
    pub publisher_confirm: Duration,
    /// How long a claim belongs to its claimer; below `resend_after`.
    pub lease: Duration,
    /// How long after a send its silence is looked at.
    pub resend_after: Duration,
    /// How much later than a delivery that counts as passed by an answered one was sent.
    pub passed_by: Duration,
    /// How long after a start nothing is resent.
    pub start_grace: Duration,
    /// How long one call to a status endpoint may take.
    pub check_call: Duration,
    /// A filter that `tracing_subscriber::EnvFilter` understands.
    pub log: String,
    /// How a line of the log looks.
    pub log_format: LogFormat,
}

impl Server {
    /// Applies the defaults and every rule; the first broken one is reported.
    pub(super) fn check(settings: Settings) -> Result<Self, Wrong> {
        let values = settings.values();
        let listen = values.listen.parse().map_err(|_| {
            wrong(
                "listen",
                format!(
                    "`{}` is not an IP address with a port; use for example 127.0.0.1:7400",
                    values.listen
                ),
            )
        })?;
        let deployment = deployment(&values.deployment)?;
        let engines = engines::check(&values.store, &values.broker, deployment)?;
        check_order(&values)?;
        let hard = HARD_PAYLOAD_BYTES as u64;
        let payload_bytes = bytes("payload_bytes", values.payload_bytes, 1, hard)?;
        // A call of the largest size has to fit, or it could never be admitted.
        let largest_call = handfast_proto::MAX_CALL_BYTES as u64;
        let inflight_bytes = bytes(
            "inflight_bytes",
            values.inflight_bytes,
            largest_call,
            MOST_INFLIGHT_BYTES,
        )?;
        Ok(Self {
            listen,
            engines,
            insecure_listen: values.insecure_listen,
            reflection: values.reflection,
            shutdown_deadline: seconds("shutdown_deadline_s", values.shutdown_deadline_s)?,
            limits: Limits { payload_bytes },
            inflight_bytes,
            max_undecided: within("max_undecided", values.max_undecided, 1, MOST_COUNT)?,
            max_backlog_bytes: within(
                "max_backlog_bytes",
                values.max_backlog_bytes,
                1,
                MOST_COUNT,
            )?,
            retention: seconds("retention_s", values.retention_s)?,
            bucket: seconds("bucket_s", values.bucket_s)?,
            publisher_confirm: millis("publisher_confirm_ms", values.publisher_confirm_ms)?,
            lease: millis("lease_ms", values.lease_ms)?,
            resend_after: millis("resend_after_ms", values.resend_after_ms)?,
            passed_by: millis("passed_by_ms", values.passed_by_ms)?,
            start_grace: millis("start_grace_ms", values.start_grace_ms)?,
            check_call: millis("check_call_ms", values.check_call_ms)?,
            log_format: log_format(&values.log_format)?,
            log: log(values.log)?,
        })
    }
}

fn wrong(key: &'static str, what: impl std::fmt::Display) -> Wrong {
    Wrong::new(
        [Place::Key("server"), Place::Key(key)],
        format!("{key}: {what}"),
    )
}

/// A send that outlives its lease could be claimed again while it is under way, and a lease
/// that outlives `resend_after` would be taken for silence.
fn check_order(values: &Values) -> Result<(), Wrong> {
    if values.publisher_confirm_ms >= values.lease_ms {
        return Err(wrong(
            "publisher_confirm_ms",
            format!(
                "{} ms is not below lease_ms, which is {} ms",
                values.publisher_confirm_ms, values.lease_ms
            ),
        ));
    }
    if values.lease_ms >= values.resend_after_ms {
        return Err(wrong(
            "lease_ms",
            format!(
                "{} ms is not below resend_after_ms, which is {} ms",
                values.lease_ms, values.resend_after_ms
            ),
        ));
    }
    Ok(())
}

fn within(key: &'static str, value: u64, least: u64, most: u64) -> Result<u64, Wrong> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(wrong(
            key,
            format!("{value} is not between {least} and {most}"),
        ))
    }
}

fn bytes(key: &'static str, value: u64, least: u64, most: u64) -> Result<usize, Wrong> {
    let value = within(key, value, least, most)?;
    usize::try_from(value).map_err(|_| wrong(key, "is more than this machine can address"))
}

fn millis(key: &'static str, value: u64) -> Result<Duration, Wrong> {
    within(key, value, 1, MOST_MS).map(Duration::from_millis)
}

fn seconds(key: &'static str, value: u64) -> Result<Duration, Wrong> {
    within(key, value, 1, MOST_S).map(Duration::from_secs)
}

/// A queue's name is the deployment's, a dot and the subscription's, at most 255 bytes together.
fn deployment(value: &str) -> Result<&str, Wrong> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=MOST_DEPLOYMENT_BYTES).contains(&value.len()) && value.chars().all(plain) {
        Ok(value)
    } else {
        Err(wrong(
            "deployment",
            format!("use 1 to {MOST_DEPLOYMENT_BYTES} letters, digits, `-` and `_`"),
        ))
    }
}

fn log_format(value: &str) -> Result<LogFormat, Wrong> {
    match value {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(wrong(
            "log_format",
            format!("`{other}` is not a format; use text or json"),
        )),
    }
}

fn log(value: String) -> Result<String, Wrong> {
    match tracing_subscriber::EnvFilter::builder().parse(&value) {
        Ok(_) => Ok(value),
        Err(error) => Err(wrong(
            "log",
            format!("`{value}` is not a filter ({error}); use for example info"),
        )),
    }
}
