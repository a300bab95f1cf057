//! Small guests on whole machines, under every processor that this host has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod altered;
mod events;
mod guests;
mod moved;
mod run;
