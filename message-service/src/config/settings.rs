//! The keys of `[server]`: the one list behind the file, the flags and the environment.

/// Makes the struct that all three sources are read into, and the one in which every key has
/// its value. The text of `--help` comes from the same line, so it cannot name another default
/// or another variable.
macro_rules! settings {
    ($($doc:literal $key:ident: $type:ty = $default:literal, $env:literal, [$($arg:tt)*];)*) => {
        /// What may be said about the server: in `[server]` of the file, in the environment,
        /// by a flag. `None` is not said.
        #[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Settings {
            $(
                #[doc = $doc]
                #[arg(
                    long,
                    env = $env,
                    hide_env_values = true,
                    help = concat!($doc, " [default: ", $default, "]"),
                    $($arg)*
                )]
                pub $key: Option<$type>,
            )*
        }

        /// Every key with its value.
        #[derive(Clone, Debug)]
        pub(super) struct Values {
            $(pub(super) $key: $type,)*
        }

        impl Settings {
            /// What is said here, and otherwise what is said there.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($key: self.$key.or(other.$key),)* }
            }

            pub(super) fn values(self) -> Values {
                Values { $($key: self.$key.unwrap_or_else(|| $default.into()),)* }
            }

            /// If the key is said here: the flag and the variable that can have said it.
            pub(super) fn source_of(&self, key: &str) -> Option<String> {
                match key {
                    $(stringify!($key) => self.$key.is_some().then(|| {
                        format!("--{} or {}", key.replace('_', "-"), $env)
                    }),)*
                    _ => None,
                }
            }
        }
    };
}

settings! {
    "The address to serve on: an IP address and a port; port 0 takes a free one"
    listen: String = "127.0.0.1:7400", "HANDFAST_LISTEN", [value_name = "ADDRESS"];

    "Where messages are kept: sqlite:FILE, or postgres://USER:PASSWORD@HOST:PORT/DATABASE"
    store: String = "sqlite:handfast.db", "HANDFAST_STORE", [value_name = "URL"];

    "What carries deliveries: embedded, or amqp://USER:PASSWORD@HOST:PORT/VHOST, several with commas"
    broker: String = "embedded", "HANDFAST_BROKER", [value_name = "URL"];

    "What every name in RabbitMQ begins with"
    deployment: String = "handfast", "HANDFAST_DEPLOYMENT", [value_name = "NAME"];

    "Serve on an address that is not loopback, although nobody is authenticated"
    insecure_listen: bool = false, "HANDFAST_INSECURE_LISTEN", [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL"
    ];

    "Serve gRPC reflection also on an address that is not loopback"
    reflection: bool = false, "HANDFAST_REFLECTION", [
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL"
    ];

    "How long calls in flight may take to finish after SIGTERM"
    shutdown_deadline_s: u64 = 25_u64, "HANDFAST_SHUTDOWN_DEADLINE_S", [value_name = "SECONDS"];

    "The largest payload, at most 1048576"
    payload_bytes: u64 = 262_144_u64, "HANDFAST_PAYLOAD_BYTES", [value_name = "BYTES"];

    "How many bytes of calls are held at the same time"
    inflight_bytes: u64 = 33_554_432_u64, "HANDFAST_INFLIGHT_BYTES", [value_name = "BYTES"];

    "How many undecided messages one producer may have"
    max_undecided: u64 = 100_000_u64, "HANDFAST_MAX_UNDECIDED", [value_name = "MESSAGES"];

    "The size of what is unfinished beyond which prepare and publish are refused"
    max_backlog_bytes: u64 = 17_179_869_184_u64, "HANDFAST_MAX_BACKLOG_BYTES", [value_name = "BYTES"];

    "How long finished messages are kept"
    retention_s: u64 = 604_800_u64, "HANDFAST_RETENTION_S", [value_name = "SECONDS"];

    "How long one table takes new bodies, before the next one does"
    bucket_s: u64 = 86_400_u64, "HANDFAST_BUCKET_S", [value_name = "SECONDS"];

    "How long a send may take; below the lease"
    publisher_confirm_ms: u64 = 10_000_u64, "HANDFAST_PUBLISHER_CONFIRM_MS", [value_name = "MS"];

    "How long a claimed message or delivery belongs to who claimed it"
    lease_ms: u64 = 30_000_u64, "HANDFAST_LEASE_MS", [value_name = "MS"];

    "How long after a send its silence is looked at; above the lease"
    resend_after_ms: u64 = 45_000_u64, "HANDFAST_RESEND_AFTER_MS", [value_name = "MS"];

    "How much later an answered delivery was sent than one that counts as passed by"
    passed_by_ms: u64 = 30_000_u64, "HANDFAST_PASSED_BY_MS", [value_name = "MS"];

    "How long after a start nothing is resent"
    start_grace_ms: u64 = 30_000_u64, "HANDFAST_START_GRACE_MS", [value_name = "MS"];

    "How long a call to a producer's status endpoint may take"
    check_call_ms: u64 = 5_000_u64, "HANDFAST_CHECK_CALL_MS", [value_name = "MS"];

    "What is logged: a level, or a filter such as info,handfast_service=debug"
    log: String = "info", "HANDFAST_LOG", [value_name = "FILTER"];

    "How a line of the log looks: text or json"
    log_format: String = "text", "HANDFAST_LOG_FORMAT", [value_name = "FORMAT"];
}
