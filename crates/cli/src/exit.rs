//! How the program ends: the error of each part, and the status scripts see.

use std::io;
use std::path::PathBuf;

use berth_appliance::error::ApplianceError;
use berth_daemon::server::DaemonError;
use berth_disk::error::DiskError;
use berth_image::agent::NoAgent;
use berth_image::initramfs::InitramfsError;
use berth_image::store::StoreError;

use crate::client::ClientError;
use crate::command::CommandError;
use crate::copy::CopyError;
use crate::machine::MachineError;
use crate::plan::PlanError;
use crate::vm::ova::OvaError;
use crate::vm::unfinished::BrokeOff;

/// The program's exit statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// 0: done; the guest powered off.
    Success,
    /// 1: it failed; the guest reset, panicked or could not be started.
    Failure,
    /// 2: the command line is wrong.
    Usage,
    /// 126: the guest's command exists and cannot be run.
    NotExecutable,
    /// 127: the guest has no such command.
    NotFound,
    /// The guest's own: its command's status, or what it wrote to the debug port.
    Guest(u8),
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(match code {
            ExitCode::Success => 0,
            ExitCode::Failure => 1,
            ExitCode::Usage => 2,
            ExitCode::NotExecutable => 126,
            ExitCode::NotFound => 127,
            ExitCode::Guest(status) => status,
        })
    }
}

/// Everything that can go wrong, by part.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// What was asked for does not fit together or is not there.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest's command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The daemon.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The daemon cannot run.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The words make no sense.
    #[error("{0}")]
    Usage(String),
    /// What needs a machine that runs.
    #[error("{name} is {state}; `berth vm start {name}` starts it")]
    NotRunning {
        /// Its name.
        name: String,
        /// What it is.
        state: &'static str,
    },
    /// A machine that was run ended other than in order.
    #[error("{name}: {reason}")]
    Ended {
        /// Its name.
        name: String,
        /// How it ended.
        reason: String,
    },
    /// A machine is out of sight.
    #[error(
        "the daemon does not tell any more of the machine {name}, which may go on: `berth vm ls` shows it, \
         and it is removed when it ends"
    )]
    OutOfSight {
        /// Its name.
        name: String,
    },
    /// A copy.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// An appliance.
    #[error(transparent)]
    Appliance(#[from] ApplianceError),
    /// An import whose connection broke.
    #[error(transparent)]
    BrokeOff(#[from] Box<BrokeOff>),
    /// An OVA.
    #[error(transparent)]
    Ova(#[from] OvaError),
    /// A file of this host that would be replaced.
    #[error("{} is there already; --force replaces it", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// A file of this host that is made.
    #[error("cannot write {}", path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of this host.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The agent's program.
    #[error(transparent)]
    NoAgent(#[from] NoAgent),
    /// No place for state.
    #[error("there is no place for images: neither HOME nor XDG_DATA_HOME is set; try --root DIR")]
    NoHome,
    /// Writing the result.
    #[error("writing the output failed")]
    Output(#[source] io::Error),
    /// Making JSON of it.
    #[error("writing the output as JSON failed")]
    Json(#[source] serde_json::Error),
}

impl CliError {
    /// The message with all its causes, each once.
    #[must_use]
    pub fn chain(&self) -> String {
        berth_daemon::failure::chain(self)
    }

    /// Whether whoever read the output has had enough.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The status for this error.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Command(error) => error.exit_code(),
            Self::Machine(error) => error.exit_code(),
            Self::Plan(PlanError::Usage(_)) | Self::Usage(_) => ExitCode::Usage,
            _ => ExitCode::Failure,
        }
    }
}
