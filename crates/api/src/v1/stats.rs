//! What machines use of their host.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::v1::machine::MachineState;

/// What a machine that runs has used. Times count from its start; a rate is the difference of two of
/// these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// The machine.
    pub name: String,
    /// Its identity.
    #[schema(value_type = String, format = Uuid)]
    pub id: uuid::Uuid,
    /// When this was so.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// Running or paused.
    pub state: MachineState,
    /// Since when it runs.
    #[schema(value_type = String, format = DateTime)]
    pub started: Timestamp,
    /// Its process.
    pub pid: u32,
    /// Milliseconds of processor time of all its processes and threads.
    pub cpu_ms: u64,
    /// The same of each virtual processor, with the processes that execute its user code.
    pub vcpu_ms: Vec<u64>,
    /// Bytes of the host's memory that it takes, with what the guest uses of its own.
    pub resident_bytes: u64,
    /// Bytes of memory that the guest has.
    pub memory_bytes: u64,
}
