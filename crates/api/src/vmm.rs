//! What the daemon and the process of a machine say to each other, on the socket `state/vmm.sock`
//! in the machine's folder.
//!
//! A connection carries one request, a line of JSON, and its answer, a line of JSON. After the
//! answers to [`Request::Agent`] and [`Request::Console`] it carries bytes in both directions; after
//! that to [`Request::Watch`] nothing, until it is closed by the end of the process.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::v1::machine::{MachineConfig, MachineState, Net};
use crate::v1::network::Port;

/// The socket's name.
pub const SOCKET: &str = "state/vmm.sock";
/// How the machine ended the last time: a [`crate::v1::machine::Exit`] as JSON.
pub const EXIT_FILE: &str = "state/exit.json";
/// The reason that is noted while a machine runs: it stays when its process is lost.
pub const UNFINISHED: &str = "its process ended without saying why; it may have been killed";
/// Locked by the process of the machine, and by whoever changes the folder.
pub const LOCK: &str = "lock";
/// It is there when a machine is a clone whose guest has not been told so yet.
pub const IDENTITY: &str = "state/identity";
/// It is there when a machine is a clone that has not begun: an [`Origin`] as JSON.
pub const ORIGIN: &str = "state/origin.json";
/// In a state that is not only of the machine that goes on with it: the guest is told by a new generation
/// id.
pub const RENEW: &str = "renew";
/// Marks a machine that is removed when it ends: JSON, a `Temporary`.
pub const TEMPORARY: &str = "state/temporary";
/// A machine that was suspended: what it is to go on with.
pub const SUSPENDED: &str = "state/suspended";
/// Bytes a line may have.
pub const LINE_MAX: u64 = 64 << 10;

/// How long the guest may take for what [`Request::Memory`] asks, and its agent to be there for
/// [`Request::Cpus`].
pub const RESIZE_TIME: Duration = Duration::from_secs(15);

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
    /// Freezes its disks at one instant, and stores the machine as it is then in a directory of its
    /// folder, which is there; without one, only the disks. It goes on, and is answered when all that
    /// can be read.
    Snapshot {
        /// The directory, relative to the folder.
        into: Option<String>,
        /// Instead of being stored the machine as it is then is kept in its process, for
        /// [`Request::Take`]; what was kept before is dropped.
        keep: bool,
    },
    /// Hands over what is kept under that number. What follows the answer is not text
    /// (`berth_vmm::machine::Handed`); after it whoever has it may say once, in a line of JSON, what he wrote
    /// of it soon ([`Wrote`]).
    Take {
        /// [`Frozen::kept`].
        kept: u64,
    },
    /// Nobody comes for what is kept any more.
    Release {
        /// [`Frozen::kept`].
        kept: u64,
    },
    /// Presses the power button. Answered when the guest has taken notice, within a second;
    /// whether anybody there cares is another matter.
    PowerButton,
    /// Asks the guest to power off, through its agent, for which it has so long to answer.
    PowerOff {
        /// How long.
        seconds: f64,
    },
    /// Lets the guest use only so many of its processors. Answered when it does.
    Cpus {
        /// How many.
        count: u8,
    },
    /// Leaves the guest only so much of its memory. Answered when it has given the rest back, or has
    /// taken back what it may; refused, and done by and by, when that takes too long.
    Memory {
        /// How many bytes.
        bytes: u64,
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
    /// What was frozen.
    Snapshot(Frozen),
    /// It was not done, and why.
    Refused(String),
}

/// A machine that was frozen and goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// How long its vCPUs stood still for it, in microseconds; 0 if they stood still before.
    pub pause_us: u64,
    /// What it is made of, which its `vm.toml` may not say any more.
    pub config: MachineConfig,
    /// For each of its disks the layer that holds what it held; nothing for those that are not written.
    pub layers: Vec<Option<String>>,
    /// What is kept of it.
    pub kept: Option<u64>,
}

/// What [`ORIGIN`] says: the machine goes on with what the process of another one keeps for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The folder of the other one.
    pub folder: PathBuf,
    /// [`Frozen::kept`].
    pub kept: u64,
}

/// What the process that becomes those of running clones is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begin {
    /// The state directory.
    pub root: PathBuf,
    /// The machine's folder.
    pub folder: PathBuf,
    /// Control groups to be in from the beginning.
    pub groups: Vec<PathBuf>,
    /// The frequency of the host's time-stamp counter, if it is known.
    pub tsc_hz: Option<u64>,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Begun {
    /// The number of the machine's process, a descriptor of which (pidfd) comes with it.
    Pid(u32),
    /// There is none, and why.
    Failed(String),
}

/// Which pages of what it shares a clone wrote soon, so that those that come later copy them at once. Whoever
/// reads it takes it for a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wrote {
    /// Of its memory.
    pub ram: Vec<Range<u64>>,
    /// Of what each of its vCPUs has translated.
    pub code: Vec<Vec<Range<u64>>>,
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
    /// The network card it was started with.
    #[serde(default)]
    pub net: Net,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub ports: Vec<Port>,
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
