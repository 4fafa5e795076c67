//! What must come out right although a process dies in the middle of it. These tests run one
//! after the other: `cargo xtask test` does so.

mod every_point;
