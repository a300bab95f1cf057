//! The daemon's HTTP interface, version 1: what goes in and out of `/berth/v1/...`.
//!
//! Bodies are JSON. Unknown fields of requests are refused. Errors are [`error::ErrorBody`] with a
//! status that fits. Routes are in [`routes`].

pub mod change;
pub mod error;
pub mod event;
pub mod image;
pub mod import;
pub mod info;
pub mod machine;
pub mod network;
pub mod routes;
pub mod run;
pub mod snapshot;
pub mod stats;
