//! The daemon itself.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Info {
    /// The program's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Where it keeps everything.
    pub root: String,
    /// Since when it runs.
    #[schema(value_type = String, format = DateTime)]
    pub started: Timestamp,
    /// Where it listens: `unix://PATH`, `tcp://ADDRESS:PORT`.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// How many machines there are.
    pub machines: u32,
    /// How many of them run.
    pub running: u32,
}
