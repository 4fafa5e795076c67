//! The checked-in code is what the .proto files say, and the contract only grows.

#![expect(
    clippy::expect_used,
    reason = "what supports a test may fail as loudly as the test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

const FILES: [&str; 5] = [
    "handfast/v1/common.proto",
    "handfast/v1/messages.proto",
    "handfast/v1/deliveries.proto",
    "handfast/v1/business_status.proto",
    "handfast/v1/console.proto",
];

/// Set to write the generated code and the lock instead of comparing with them.
const UPDATE: &str = "HANDFAST_UPDATE_GENERATED";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn descriptors() -> FileDescriptorSet {
    protox::compile(FILES.map(|file| root().join(file)), [root()]).expect("the contract compiles")
}

fn same_or_update(path: &Path, wanted: &[u8]) {
    if std::env::var_os(UPDATE).is_some() {
        fs::write(path, wanted).expect("the generated file can be written");
        return;
    }
    let found = fs::read(path).unwrap_or_default();
    assert!(
        found == wanted,
        "{} is not current; run {UPDATE}=1 cargo test -p handfast-proto",
        path.display()
    );
}

#[test]
fn generated_code_is_current() {
    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .extern_path(".google.rpc", "::tonic_types::pb")
        .bytes(".handfast.v1.NewMessage.payload")
        .bytes(".handfast.v1.Delivery.payload")
        .compile_fds(descriptors())
        .expect("the contract generates");
    let code = fs::read(out.path().join("handfast.v1.rs")).expect("generated code");
    same_or_update(&root().join("src/gen/handfast.v1.rs"), &code);
    same_or_update(
        &root().join("src/gen/handfast.v1.bin"),
        &descriptors().encode_to_vec(),
    );
}

/// Every name, number and type a client may rely on, one per line.
fn promises() -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in descriptors().file {
        if file.package() != "handfast.v1" {
            continue;
        }
        for message in &file.message_type {
            message_promises(message.name(), message, &mut lines);
        }
        for kind in &file.enum_type {
            enum_promises(kind, &mut lines);
        }
        for service in &file.service {
            for rpc in &service.method {
                lines.insert(format!(
                    "rpc {}.{}({}{}) returns ({}{})",
                    service.name(),
                    rpc.name(),
                    if rpc.client_streaming() {
                        "stream "
                    } else {
                        ""
                    },
                    rpc.input_type(),
                    if rpc.server_streaming() {
                        "stream "
                    } else {
                        ""
                    },
                    rpc.output_type()
                ));
            }
        }
    }
    lines
}

fn message_promises(path: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    for field in &message.field {
        lines.insert(format!(
            "field {path}.{} = {} {:?} {:?} {} {}",
            field.name(),
            field.number(),
            field.r#type(),
            field.label(),
            field.type_name(),
            if field.proto3_optional() {
                "optional"
            } else {
                ""
            }
        ));
    }
    for nested in &message.nested_type {
        message_promises(&format!("{path}.{}", nested.name()), nested, lines);
    }
    for kind in &message.enum_type {
        enum_promises(kind, lines);
    }
}

fn enum_promises(kind: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    for value in &kind.value {
        lines.insert(format!("value {} = {}", value.name(), value.number()));
    }
}

#[test]
fn nothing_a_client_relies_on_was_taken_away() {
    let path = root().join("contract.lock");
    let now = promises();
    if std::env::var_os(UPDATE).is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&path, text).expect("the lock can be written");
        return;
    }
    let locked = fs::read_to_string(&path).expect("contract.lock");
    let lost: Vec<_> = locked.lines().filter(|line| !now.contains(*line)).collect();
    assert!(
        lost.is_empty(),
        "a breaking change of the contract: {lost:#?}"
    );
    let grown = now.len() - locked.lines().count();
    assert!(
        grown == 0,
        "{grown} new promises; run {UPDATE}=1 cargo test -p handfast-proto"
    );
}
