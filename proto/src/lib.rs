//! The gRPC contract of Handfast.
//!
//! The contract is `handfast/v1/*.proto`; the Rust code in `src/gen` is made from it and
//! checked in, so that building needs no protocol compiler. `tests/contract.rs` proves that
//! the two agree and that nothing a client relies on was taken away.

/// Version 1 of the contract.
pub mod v1 {
    #![expect(
        missing_docs,
        clippy::allow_attributes,
        reason = "generated; the .proto files carry the documentation of the generated methods"
    )]
    include!("gen/handfast.v1.rs");
}

/// The encoded descriptors of every service above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/handfast.v1.bin");

/// The largest number of items in one list.
pub const MAX_ITEMS: usize = 500;

/// The largest call that is decoded, in bytes: a full list, or one item at the hard limit,
/// with room for its frame.
pub const MAX_CALL_BYTES: usize = 2 * 1024 * 1024;

/// The largest number of questions in one status check.
pub const MAX_QUESTIONS: usize = 100;

/// The largest reply of a status check that is read, in bytes.
pub const MAX_CHECK_REPLY_BYTES: usize = 1024 * 1024;
