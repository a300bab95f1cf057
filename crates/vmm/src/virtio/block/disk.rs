//! The file behind a disk: opened, measured, locked.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Unit of the protocol, whatever the block size is.
pub const SECTOR_SIZE: u64 = 512;

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open disk {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Not a file or block device, or its size is unknown.
    #[error("cannot find out the size of disk {path}")]
    Size {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("disk {path} is neither a file nor a block device")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Not even one sector.
    #[error("disk {path} is smaller than a sector of {SECTOR_SIZE} bytes")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Another process uses it, or this one twice.
    #[error("disk {path} is in use by another virtual machine")]
    Locked {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// What is needed to open a disk.
#[derive(Clone, Debug, Default)]
pub struct DiskConfig {
    /// The raw image or block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
    /// What the guest reads as the disk's identifier; at most 20 bytes are shown.
    pub serial: String,
    /// Use threads even where io_uring works.
    pub no_io_uring: bool,
}

/// An open disk. Its lock lasts as long as the file is open.
#[derive(Debug)]
pub struct Disk {
    /// The open file.
    pub file: File,
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
        use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
        let path = config.path.clone();
        let mut file = match OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            // A FIFO must not block the start.
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
        {
            Ok(file) => file,
            Err(source) => return Err(DiskError::Open { path, source }),
        };
        let kind = match file.metadata() {
            Ok(metadata) => metadata.file_type(),
            Err(source) => return Err(DiskError::Size { path, source }),
        };
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path });
        }
        let size = match file.seek(SeekFrom::End(0)) {
            Ok(size) => size,
            Err(source) => return Err(DiskError::Size { path, source }),
        };
        let sectors = size / SECTOR_SIZE;
        if sectors == 0 {
            return Err(DiskError::Empty { path });
        }
        lock(&file, &path, config.read_only)?;
        Ok(Self { file, sectors, read_only: config.read_only, serial: config.serial.clone() })
    }
}

/// An open-file-description lock: it also excludes a second opening by the same process, and ends
/// with the file, however the process ends.
fn lock(file: &File, path: &Path, shared: bool) -> Result<(), DiskError> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let range = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the call, and the pointer is to a live flock structure that
    // the kernel only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result == 0 {
        return Ok(());
    }
    let source = std::io::Error::last_os_error();
    Err(DiskError::Locked { path: path.to_owned(), source })
}
