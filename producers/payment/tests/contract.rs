//! The checked-in code is what the .proto file says.

use std::fs;
use std::path::PathBuf;

/// Set to write the generated code instead of comparing with it.
const UPDATE: &str = "HANDFAST_UPDATE_GENERATED";

#[test]
fn generated_code_is_current() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("proto");
    let descriptors = protox::compile([proto.join("payment/v1/payment.proto")], [proto])
        .expect("the contract compiles");
    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .compile_fds(descriptors)
        .expect("the contract generates");
    let wanted = fs::read(out.path().join("payment.v1.rs")).expect("generated code");
    let path = root.join("src/gen/payment.v1.rs");
    if std::env::var_os(UPDATE).is_some() {
        fs::write(&path, wanted).expect("the generated file can be written");
        return;
    }
    assert!(
        fs::read(&path).unwrap_or_default() == wanted,
        "{} is not current; run {UPDATE}=1 cargo test -p payment --test contract",
        path.display()
    );
}
