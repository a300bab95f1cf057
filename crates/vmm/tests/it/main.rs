//! Small guests on whole machines, under every processor that this host has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guests;
mod run;
