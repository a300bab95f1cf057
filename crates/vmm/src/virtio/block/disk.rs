//! The disk behind the device: opened, measured, locked.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use berth_disk::chain::{Access, open_file, open_image};
use berth_disk::format::Format;
use berth_disk::storage::Storage;
use thiserror::Error;

use crate::virtio::block::live::{DiskSwitch, LiveImage};

/// Unit of the protocol, whatever the block size is.
pub const SECTOR_SIZE: u64 = 512;

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened, or somebody else uses it.
    #[error(transparent)]
    Open(#[from] berth_disk::error::DiskError),
    /// Its size is unknown.
    #[error("cannot find out the size of disk {path}")]
    Size {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Not even one sector.
    #[error("disk {path} is smaller than a sector of {SECTOR_SIZE} bytes")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// What is needed to open a disk.
#[derive(Clone, Debug, Default)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// What it holds. It is never found out by looking: a guest could write what is found.
    pub format: Format,
    /// Refuse writes.
    pub read_only: bool,
    /// What the guest reads as the disk's identifier; at most 20 bytes are shown.
    pub serial: String,
    /// Use threads even where io_uring works.
    pub no_io_uring: bool,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug)]
pub enum Contents {
    /// In a file, one after the other.
    Raw(Arc<File>),
    /// In an image, with what is below it.
    Qcow2(Arc<LiveImage>),
}

/// An open disk. Its lock lasts as long as the file is open.
#[derive(Debug)]
pub struct Disk {
    /// Its bytes.
    pub contents: Contents,
    /// Whole sectors; an incomplete last one is not shown to the guest.
    pub sectors: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The identifier.
    pub serial: String,
}

impl Disk {
    /// Opens, measures and locks a disk: shared if read-only, else exclusive.
    ///
    /// # Errors
    /// The file cannot be used, or someone else uses it.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let path = &config.path;
        let access = if config.read_only { Access::Read } else { Access::Write };
        let (contents, size) = match config.format {
            Format::Raw => {
                let file = open_file(path, access)?;
                let size = Storage::size(&file);
                (Contents::Raw(Arc::new(file)), size)
            }
            Format::Qcow2 => {
                let image = open_image(path, access)?;
                let size = image.size();
                (Contents::Qcow2(Arc::new(LiveImage::new(path, image))), Ok(size))
            }
        };
        let size = size.map_err(|source| DiskError::Size { path: path.clone(), source })?;
        let sectors = size / SECTOR_SIZE;
        if sectors == 0 {
            return Err(DiskError::Empty { path: path.clone() });
        }
        let serial = config.serial.clone();
        Ok(Self { contents, sectors, read_only: config.read_only, serial })
    }

    /// Sectors that are given back together.
    #[must_use]
    pub fn discard_sectors(&self) -> u32 {
        match &self.contents {
            // A page.
            Contents::Raw(_) => 8,
            Contents::Qcow2(image) => {
                image.with(|image| (image.header().cluster_bytes() / SECTOR_SIZE) as u32)
            }
        }
    }

    /// What freezes it: only a qcow2 image that is written can be.
    #[must_use]
    pub fn switch(&self) -> Option<DiskSwitch> {
        match &self.contents {
            Contents::Qcow2(image) if !self.read_only => Some(DiskSwitch(Arc::clone(image))),
            _ => None,
        }
    }
}
