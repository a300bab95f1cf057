//! The differential test with `cargo test`.

mod harness;
mod traps;
