//! The words of commands for snapshots and clones.

use std::path::PathBuf;

use berth_api::size::Size;
use berth_api::v1::snapshot::CLONES_MAX;

use crate::args::machine::Accel;

/// `berth vm snapshot`.
#[derive(Clone, Debug, clap::Args)]
pub struct SnapshotArgs {
    /// What to call it [default: the time]
    #[arg(long, short, value_name = "TAG")]
    pub tag: Option<String>,
    /// Only the disks, also of a machine that runs: as if its power had failed then
    #[arg(long)]
    pub disk_only: bool,
    /// The machine's name
    pub name: String,
}

/// `berth vm snapshots`.
#[derive(Clone, Debug, clap::Args)]
pub struct SnapshotsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The machine's name
    pub name: String,
}

/// `berth vm restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// Also a machine that runs or is suspended, which is lost
    #[arg(long, short)]
    pub force: bool,
    /// The machine's name
    pub name: String,
    /// The snapshot's tag
    pub tag: String,
}

/// `berth vm snapshot-rm`.
#[derive(Clone, Debug, clap::Args)]
pub struct SnapshotRmArgs {
    /// The machine's name
    pub name: String,
    /// The snapshots' tags
    #[arg(required = true, value_name = "TAG")]
    pub tags: Vec<String>,
}

/// `berth vm clone`.
#[derive(Clone, Debug, clap::Args)]
pub struct CloneArgs {
    /// So many, called NEW-1, NEW-2 and so on; all of them or none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(CLONES_MAX)))]
    pub count: Option<u32>,
    /// They go on where the machine is, with its memory
    #[arg(long)]
    pub running: bool,
    /// Of this snapshot instead of the machine as it is now
    #[arg(long, short, value_name = "TAG")]
    pub tag: Option<String>,
    /// The machine's name
    pub name: String,
    /// What the clone is to be called
    pub new: String,
}

/// `berth check-state`.
#[derive(Clone, Debug, clap::Args)]
pub struct CheckStateArgs {
    /// What runs the guest's instructions
    #[arg(long, value_enum)]
    pub accel: Accel,
    /// Virtual processors
    #[arg(long)]
    pub cpus: u8,
    /// Memory
    #[arg(long)]
    pub memory: Size,
    /// Where the machine is stored
    pub directory: PathBuf,
}
