//! The words of `berth disk`.

use std::path::PathBuf;

use berth_api::size::Size;
use berth_disk::format::Format;
use clap::Subcommand;

const DISK_EXAMPLES: &str = "\
Examples:
  berth disk create data.raw 10G
  berth disk create --backing base.raw --backing-format raw work.qcow2";

/// Commands for disks. A file whose name ends in `.qcow2` is taken for one, others for raw.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a disk; it takes no space until it is written
    Create(DiskCreateArgs),
    /// Make a disk larger, or smaller
    Resize(DiskResizeArgs),
    /// Copy a disk into one of another format, with nothing below it
    Convert(DiskConvertArgs),
    /// Print what a disk is and what it is based on
    Info(DiskFile),
    /// Compare what a qcow2 disk says of itself; status 1 if it is damaged
    Check(DiskFile),
}

/// `berth disk create`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = DISK_EXAMPLES)]
pub struct DiskCreateArgs {
    /// `raw` or `qcow2` [default: as the name says]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Base it on this disk, which is not written; qcow2 only
    #[arg(long, value_name = "FILE")]
    pub backing: Option<PathBuf>,
    /// What that disk is [default: as its name says]
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<Format>,
    /// The new file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How large the guest sees it [default: as the disk it is based on]
    #[arg(value_name = "SIZE", required_unless_present = "backing")]
    pub size: Option<Size>,
}

/// `berth disk resize`.
#[derive(Clone, Debug, clap::Args)]
pub struct DiskResizeArgs {
    /// `raw` or `qcow2` [default: as the name says]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Make it smaller: what is behind the new end is lost
    #[arg(long)]
    pub shrink: bool,
    /// The disk
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How large the guest is to see it
    #[arg(value_name = "SIZE")]
    pub size: Size,
}

/// `berth disk convert`.
#[derive(Clone, Debug, clap::Args)]
pub struct DiskConvertArgs {
    /// What FROM is [default: as its name says]
    #[arg(long, value_name = "FORMAT")]
    pub from_format: Option<Format>,
    /// What TO is to be [default: as its name says]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// The disk
    #[arg(value_name = "FROM")]
    pub from: PathBuf,
    /// The new file
    #[arg(value_name = "TO")]
    pub to: PathBuf,
}

/// `berth disk info`, `berth disk check`.
#[derive(Clone, Debug, clap::Args)]
pub struct DiskFile {
    /// `raw` or `qcow2` [default: as the name says]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The disk
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}
