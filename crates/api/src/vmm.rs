//! What the daemon and the process of a machine say to each other, on the socket `state/vmm.sock`
//! in the machine's folder.
//!
//! A connection carries one request, a line of JSON, and its answer, a line of JSON. After the
//! answers to [`Request::Agent`] and [`Request::Console`] it carries bytes in both directions; after
//! that to [`Request::Watch`] nothing, until it is closed by the end of the process.

use serde::{Deserialize, Serialize};

use crate::v1::machine::MachineState;

/// The socket's name.
pub const SOCKET: &str = "state/vmm.sock";
/// How the machine ended the last time: a [`crate::v1::machine::Exit`] as JSON.
pub const EXIT_FILE: &str = "state/exit.json";
/// The reason that is noted while a machine runs: it stays when its process is lost.
pub const UNFINISHED: &str = "its process ended without saying why; it may have been killed";
/// Locked by the process of the machine, and by whoever changes the folder.
pub const LOCK: &str = "lock";
/// A machine that was suspended: what it is to go on with.
pub const SUSPENDED: &str = "state/suspended";
/// Bytes a line may have.
pub const LINE_MAX: u64 = 64 << 10;

/// What is asked of a machine's process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How it is.
    Status,
    /// As `Status`; then nothing until the process ends.
    Watch,
    /// Its vCPUs stop where they are. Answered when they stand still.
    Pause,
    /// They go on.
    Unpause,
    /// Stores the machine in [`SUSPENDED`] and ends it. Answered when it is stored.
    Suspend,
    /// Asks the guest to power off, through its agent, for which it has so long to answer.
    PowerOff {
        /// How long.
        seconds: f64,
    },
    /// Ends the machine at once.
    Kill,
    /// Connects to a vsock port of the guest.
    Agent,
    /// Connects to the console.
    Console {
        /// At first, so many of the last bytes that were printed.
        backlog: u32,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done, or the connection is made.
    Done,
    /// How the machine is.
    Status(Status),
    /// It was not done, and why.
    Refused(String),
}

/// How a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: MachineState,
    /// The process.
    pub pid: u32,
    /// Since when it runs.
    pub started: jiff::Timestamp,
    /// What runs the guest's instructions.
    pub accel: String,
    /// Its virtual processors; 0 from a process that is older than this.
    #[serde(default)]
    pub cpus: u8,
    /// Bytes of the guest's memory.
    #[serde(default)]
    pub memory_bytes: u64,
}

/// The first line of a machine's process on its standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Greeting {
    /// It runs.
    Started(Status),
    /// It cannot be started, and why.
    Failed(String),
}
