//! Small guests on whole machines, under every processor that this host has.

mod guests;
mod run;
