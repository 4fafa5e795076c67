//! What a configuration is refused for, and where the refusal points.

use std::time::Duration;

use clap::Parser;

use super::{Config, Engines, Error, LogFormat, Settings};
use crate::message::Attempts;

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(text, "handfast.toml", Settings::default())
}

/// The one line of the refusal.
fn refused(text: &str) -> String {
    let line = parse(text).expect_err(text).to_string();
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

#[test]
fn every_configuration_of_the_guide_is_one() {
    for page in [
        include_str!("../../../README.md"),
        include_str!("../../../docs/guide/service.md"),
        include_str!("../../../docs/guide/reference-services.md"),
    ] {
        let blocks: Vec<_> = page.split("```toml\n").skip(1).collect();
        assert!(!blocks.is_empty());
        for block in blocks {
            let text = block.split("```").next().unwrap();
            assert!(parse(text).unwrap().topology.is_some());
        }
    }
}

const PRODUCER: &str = "topology_version = 1\n[[producer]]\nname = \"payment\"\n";
const SUBSCRIPTION: &str = "topology_version = 1\n[[topic]]\nname = \"t\"\n\
                            [[subscription]]\nname = \"s\"\ntopic = \"t\"\n";

#[test]
fn an_empty_file_is_all_defaults_and_leaves_the_topology_alone() {
    let config = parse("").unwrap();
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:7400");
    let file = "handfast.db".into();
    assert_eq!(config.server.engines, Engines::Embedded { file });
    assert_eq!(config.server.shutdown_deadline, Duration::from_secs(25));
    assert_eq!(config.server.limits.payload_bytes, 262_144);
    assert_eq!(config.server.lease, Duration::from_secs(30));
    assert_eq!(config.server.log_format, LogFormat::Text);
    assert!(!config.server.insecure_listen);
    assert!(config.topology.is_none());
}

#[test]
fn a_version_without_tables_is_an_empty_topology() {
    let topology = parse("topology_version = 3").unwrap().topology.unwrap();
    assert_eq!(topology.version, 3);
    assert!(topology.producers.is_empty());
}

#[test]
fn what_a_subscription_leaves_out_has_the_policy_of_the_design() {
    let topology = parse(SUBSCRIPTION).unwrap().topology.unwrap();
    assert_eq!(
        topology.policy("s"),
        Some(&crate::message::DeliveryPolicy::default())
    );
    let with = format!(
        "{SUBSCRIPTION}attempts = \"unlimited\"\nschedule_ms = [3000, 8000]\nmax_age_s = 60\n"
    );
    let topology = parse(&with).unwrap().topology.unwrap();
    let policy = topology.policy("s").unwrap();
    assert_eq!(policy.attempts, Attempts::Unlimited);
    assert_eq!(policy.schedule, [3, 8].map(Duration::from_secs));
    assert_eq!(policy.max_age, Some(Duration::from_secs(60)));
}

#[test]
fn who_answers_can_be_named_only_where_it_can_be_known() {
    let guarded = format!("{SUBSCRIPTION}amqp_user = \"accounting\"\n");
    let error = refused(&guarded);
    assert!(error.contains("amqp_user needs [server] broker"), "{error}");
    let servers = "[server]\nstore = \"postgres://h/d\"\nbroker = \"amqp://h\"\n";
    let topology = parse(&format!("{guarded}{servers}")).unwrap().topology;
    let user = &topology.unwrap().subscriptions["s"].amqp_user;
    assert_eq!(user.as_deref(), Some("accounting"));
}

#[test]
fn an_unknown_key_is_an_error_with_its_line() {
    for (text, line, key) in [
        (
            "\n\n[server]\nlisten = \"127.0.0.1:1\"\nlissen = 1\n",
            5,
            "lissen",
        ),
        ("topologie = 1\n", 1, "topologie"),
        (&format!("{PRODUCER}check_ms = 1\n"), 4, "check_ms"),
        (
            "topology_version = 1\n[[topic]]\nname = \"t\"\nkeep = true\n",
            4,
            "keep",
        ),
        (&format!("{SUBSCRIPTION}on_dead = \"d\"\n"), 7, "on_dead"),
    ] {
        let error = refused(text);
        let start = format!("handfast.toml:{line}: unknown key `{key}`");
        assert!(error.starts_with(&start), "{error}");
    }
}

#[test]
fn a_wrong_type_is_an_error_with_its_line() {
    for (text, line) in [
        ("[server]\nlease_ms = \"long\"\n", 2),
        ("[server]\nlease_ms = -1\n", 2),
        ("[server]\nlisten = 7400\n", 2),
        (&format!("{SUBSCRIPTION}attempts = \"many\"\n"), 7),
        (&format!("{SUBSCRIPTION}attempts = 0\n"), 7),
        (&format!("{SUBSCRIPTION}schedule_ms = 3\n"), 7),
        ("[server\n", 1),
        ("[server]\nlease_ms = 1\nlease_ms = 2\n", 3),
    ] {
        let error = refused(text);
        assert!(
            error.starts_with(&format!("handfast.toml:{line}: ")),
            "{error}"
        );
    }
}

#[test]
fn every_rule_of_the_server_names_the_line_and_the_key() {
    for (written, what) in [
        (
            "listen = \"localhost:7400\"",
            "listen: `localhost:7400` is not an IP address",
        ),
        (
            "listen = \"127.0.0.1\"",
            "listen: `127.0.0.1` is not an IP address",
        ),
        (
            "payload_bytes = 0",
            "payload_bytes: 0 is not between 1 and 1048576",
        ),
        (
            "payload_bytes = 1048577",
            "payload_bytes: 1048577 is not between",
        ),
        (
            "inflight_bytes = 1000",
            "inflight_bytes: 1000 is not between 2097152",
        ),
        ("max_undecided = 0", "max_undecided: 0 is not"),
        ("max_backlog_bytes = 0", "max_backlog_bytes: 0 is not"),
        ("retention_s = 0", "retention_s: 0 is not"),
        ("bucket_s = 0", "bucket_s: 0 is not"),
        (
            "shutdown_deadline_s = 9999999999",
            "shutdown_deadline_s: 9999999999 is not",
        ),
        ("passed_by_ms = 0", "passed_by_ms: 0 is not"),
        ("check_call_ms = 86400001", "check_call_ms: 86400001 is not"),
        (
            "publisher_confirm_ms = 30000",
            "publisher_confirm_ms: 30000 ms is not below lease_ms",
        ),
        (
            "lease_ms = 45000",
            "lease_ms: 45000 ms is not below resend_after_ms",
        ),
        (
            "resend_after_ms = 100",
            "lease_ms: 30000 ms is not below resend_after_ms",
        ),
        (
            "log = \"handfast=loud\"",
            "log: `handfast=loud` is not a filter",
        ),
        ("log_format = \"xml\"", "log_format: `xml` is not a format"),
        (
            "store = \"mysql://root:secret@db/x\"",
            "store: `mysql:` is not a store",
        ),
        (
            "store = \"handfast.db\"",
            "store: a URL without `:` is not a store",
        ),
        ("store = \"sqlite:\"", "store: messages need a file"),
        ("store = \"sqlite::memory:\"", "store: messages need a file"),
        (
            "store = \"sqlite:a.db?mode=ro\"",
            "store: options behind `?`",
        ),
        (
            "broker = \"kafka://secret\"",
            "broker: `kafka:` is not a broker",
        ),
        (
            "broker = \"amqp://guest:secret@mq\"",
            "broker: sqlite: and amqp:// do not go together",
        ),
        (
            "store = \"postgres://u:secret@db\"",
            "broker: postgres:// and embedded do not go together",
        ),
        (
            "store = \"postgres://u:secret@db\"\nbroker = \"amqp://u:secret@mq\"",
            "store: the URL names no database",
        ),
        (
            "store = \"postgres://u:secret@db:x/d\"\nbroker = \"amqp://u:secret@mq\"",
            "store: this is not a URL of a PostgreSQL database",
        ),
        (
            "broker = \"amqp://mq,amqps://u:secret@mq\"\nstore = \"postgres://db/d\"",
            "broker: amqps:// is not supported yet",
        ),
        (
            "deployment = \"my shop\"",
            "deployment: use 1 to 50 letters",
        ),
    ] {
        let error = refused(&format!("# first\n[server]\n{written}\n"));
        // A rule about two keys points to the key that is named first, and to the table if
        // the file leaves that one out.
        let place = error.split(": ").next().unwrap();
        assert!(
            ["handfast.toml:2", "handfast.toml:3"].contains(&place),
            "{error}"
        );
        assert!(error.contains(what), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn every_rule_of_the_topology_names_the_line_and_the_table() {
    let long = "n".repeat(101);
    for (text, place, what) in [
        (
            "[[producer]]\nname = \"p\"\n".to_owned(),
            1,
            "needs a topology_version",
        ),
        (
            "topology_version = 0\n".to_owned(),
            1,
            "the first version is 1",
        ),
        (
            format!("{PRODUCER}[[producer]]\nname = \"payment\"\n"),
            5,
            "`payment`: name is there twice",
        ),
        (
            format!("{PRODUCER}[[producer]]\nname = \"\"\n"),
            5,
            "name is empty",
        ),
        (
            format!("{PRODUCER}[[producer]]\nname = \"{long}\"\n"),
            5,
            "size 101 bytes is over",
        ),
        (
            format!("{PRODUCER}[[producer]]\nname = \"a\\u0000\"\n"),
            5,
            "control character",
        ),
        (
            format!("{PRODUCER}check_after_ms = 0\n"),
            4,
            "check_after_ms 0 is not between",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"https://h:1\"\n"),
            4,
            "https:// is not supported yet",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"h:1\"\n"),
            4,
            "does not begin with http://",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"http://h\"\n"),
            4,
            "has no port",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"http://h:0\"\n"),
            4,
            "has no port",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"http://h:1/p\"\n"),
            4,
            "has a path",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"http://u@h:1\"\n"),
            4,
            "has a user name",
        ),
        (
            format!("{PRODUCER}status_endpoint = \"http://h h\"\n"),
            4,
            "is not a URL",
        ),
        (
            format!("{PRODUCER}[[topic]]\nname = \"t\"\nproducers = [\"order\"]\n"),
            6,
            "names `order`, but there is no [[producer]]",
        ),
        (
            format!("{PRODUCER}[[topic]]\nname = \"t\"\nproducers = [\"payment\", \"payment\"]\n"),
            6,
            "names `payment` twice",
        ),
        (
            format!("{SUBSCRIPTION}[[subscription]]\nname = \"r\"\ntopic = \"u\"\n"),
            9,
            "subscription `r`: topic names `u`, but there is no [[topic]]",
        ),
        (
            format!("{SUBSCRIPTION}[[subscription]]\nname = \"s\"\ntopic = \"t\"\n"),
            8,
            "subscription `s`: name is there twice",
        ),
        (
            format!("{SUBSCRIPTION}schedule_ms = []\n"),
            7,
            "schedule_ms has 0 steps",
        ),
        (
            format!("{SUBSCRIPTION}schedule_ms = [5, 0]\n"),
            7,
            "schedule_ms 0 is not between",
        ),
        (
            format!("{SUBSCRIPTION}schedule_ms = [9999999999]\n"),
            7,
            "is not between",
        ),
        (
            format!("{SUBSCRIPTION}max_age_s = 0\n"),
            7,
            "max_age_s 0 is not between",
        ),
    ] {
        let error = refused(&text);
        assert!(
            error.starts_with(&format!("handfast.toml:{place}: ")),
            "{error}"
        );
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_kind_has_at_most_a_thousand_tables() {
    let tables = |count: usize| {
        let tables: String = (0..count)
            .map(|n| format!("[[topic]]\nname = \"t{n}\"\n"))
            .collect();
        format!("topology_version = 1\n{tables}")
    };
    assert_eq!(
        parse(&tables(1000)).unwrap().topology.unwrap().topics.len(),
        1000
    );
    assert!(refused(&tables(1001)).contains("1001 tables [[topic]] are over the limit of 1000"));
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

fn flags(arguments: &[&str]) -> Settings {
    let arguments = std::iter::once("serve").chain(arguments.iter().copied());
    Flags::try_parse_from(arguments).unwrap().settings
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let file = "[server]\nlisten = \"127.0.0.1:1\"\nretention_s = 5\ninsecure_listen = true\n";
    let with = |arguments: &[&str]| Config::parse(file, "f", flags(arguments)).unwrap().server;

    let server = with(&["--listen", "127.0.0.1:2"]);
    assert_eq!(server.listen.port(), 2);
    assert_eq!(server.retention, Duration::from_secs(5));
    assert_eq!(server.bucket, Duration::from_secs(86_400));
    assert!(server.insecure_listen);
    assert!(!with(&["--insecure-listen=false"]).insecure_listen);
    assert!(flags(&["--insecure-listen"]).insecure_listen.unwrap());
}

#[test]
fn a_wrong_flag_is_not_blamed_on_the_file() {
    let file = "[server]\nlease_ms = 20000\n";
    let error = Config::parse(file, "f", flags(&["--lease-ms", "60000"])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--lease-ms or HANDFAST_LEASE_MS: lease_ms: 60000 ms is not below resend_after_ms, \
         which is 45000 ms"
    );
}

#[test]
fn every_key_has_a_flag_and_a_variable_of_its_name() {
    use clap::CommandFactory as _;
    let command = Flags::command();
    let arguments: Vec<_> = command.get_arguments().collect();
    assert!(arguments.len() >= 20);
    for argument in arguments {
        let key = argument.get_id().as_str();
        let variable = format!("HANDFAST_{}", key.to_uppercase());
        assert_eq!(
            argument.get_env().and_then(|v| v.to_str()),
            Some(variable.as_str())
        );
        assert_eq!(argument.get_long(), Some(key.replace('_', "-").as_str()));
        let help = argument.get_help().unwrap().to_string();
        assert!(
            help.contains("[default: ") && !help.contains("_u64"),
            "{help}"
        );
    }
}

#[test]
fn a_file_that_is_not_there_says_how_to_begin() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("handfast.toml");
    let error = Config::load(&missing, Settings::default()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }));
    assert!(
        error
            .to_string()
            .contains("--config FILE, or begin with `printf"),
        "{error}"
    );
    let error = Config::load(folder.path(), Settings::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("it is a folder"), "{error}");
    std::fs::write(&missing, [0xff, 0xfe]).unwrap();
    let error = Config::load(&missing, Settings::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("UTF-8"), "{error}");
}
