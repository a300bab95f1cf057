//! Why a disk cannot be used.

use std::io;
use std::path::PathBuf;

use crate::format::Format;
use crate::limits::CHAIN_LAYERS_MAX;
use crate::qcow2::header::HeaderError;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file operation failed.
    #[error("{operation} {path} failed", path = path.display())]
    File {
        /// What was done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("{path} is neither a file nor a block device", path = path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Another process uses it, or this one twice.
    #[error("disk {path} is in use by another virtual machine or tool", path = path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The image is damaged, or needs what is not supported.
    #[error("cannot use {path} as a qcow2 image", path = path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The image does not say what its backing file is.
    #[error(
        "{path} does not say the format of its backing file {backing}, and guessing would be unsafe; \
         try `qemu-img rebase -u -F FORMAT -b {backing} {path}`",
        path = path.display()
    )]
    NoBackingFormat {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
    /// The backing file has a format, or a kind of name, that is not supported.
    #[error("{path} is based on `{backing}` ({reason})", path = path.display())]
    Backing {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
        /// Why it is not possible.
        reason: String,
    },
    /// A file is based on itself.
    #[error("{path} is based on itself", path = path.display())]
    Loop {
        /// The file found again.
        path: PathBuf,
    },
    /// Too many layers.
    #[error("{path} has more than {CHAIN_LAYERS_MAX} layers; convert it to make it one", path = path.display())]
    Deep {
        /// The topmost file.
        path: PathBuf,
    },
    /// A size is impossible.
    #[error("{path} cannot have {size} bytes: {reason}", path = path.display())]
    Size {
        /// The disk.
        path: PathBuf,
        /// What was asked for.
        size: u64,
        /// Why not.
        reason: String,
    },
    /// Something in the way.
    #[error("{path} exists already; remove it or choose another name", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The format does not have this.
    #[error("{path}: {format} disks have no {what}", path = path.display())]
    NoSuch {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: Format,
        /// What it lacks.
        what: &'static str,
    },
}

/// The error of a file operation, for `map_err`.
pub(crate) fn failed(
    operation: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::File { operation, path, source }
}
