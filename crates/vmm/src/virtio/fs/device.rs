//! The shared folder as a virtio device: a queue for what must not wait (forgetting), and one for
//! requests.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Resource, Rlimit};

use crate::confine::Kind;
use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::fs::server::Server;
use crate::virtio::fs::sys;
use crate::virtio::limits::{FS_FILES_MAX, FS_FILES_MIN, FS_FILES_RESERVED};

const URGENT_QUEUE_SIZE: u16 = 128;
/// A request has a descriptor for each page: 256 of them are data.
const REQUEST_QUEUE_SIZE: u16 = 1024;
/// Bytes of the tag in the configuration.
pub const TAG_BYTES_MAX: usize = 36;

/// A folder of the host for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderShare {
    /// The folder.
    pub path: PathBuf,
    /// The name by which the guest mounts it: 1 to [`TAG_BYTES_MAX`] bytes without a zero.
    pub tag: String,
    /// The guest may not change anything in it.
    pub read_only: bool,
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be opened.
    #[error("cannot share the folder {path}; is it there, and a folder?", path = path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its tag is impossible.
    #[error(
        "`{0}` is no tag of a shared folder: it has 1 to {TAG_BYTES_MAX} bytes, none of them zero"
    )]
    Tag(String),
    /// The process has no files left for it.
    #[error(
        "sharing {path} takes {FS_FILES_MIN} open files, and {left} are left; raise the limit \
         (`ulimit -n`, or LimitNOFILE= of a service)", path = path.display()
    )]
    Files {
        /// Which folder.
        path: PathBuf,
        /// Open files that there could be.
        left: u64,
    },
}

/// A virtio-fs device.
pub struct Folder {
    server: Server,
    config: Arc<DeviceConfig>,
}

/// Raises this process' limit of open files as far as it may and as shares can use, and tells how many
/// each of `shares` gets.
#[must_use]
pub fn files_for_each(shares: usize) -> u64 {
    let shares = shares.max(1) as u64;
    let Rlimit { current, maximum } = rustix::process::getrlimit(Resource::Nofile);
    let wanted = FS_FILES_RESERVED + shares * FS_FILES_MAX;
    let possible = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let mut limit = current.unwrap_or(wanted);
    if possible > limit {
        let raised = Rlimit { current: Some(possible), maximum };
        // Where that is refused there are as many as before.
        if rustix::process::setrlimit(Resource::Nofile, raised).is_ok() {
            limit = possible;
        }
    }
    (limit.saturating_sub(FS_FILES_RESERVED) / shares).min(FS_FILES_MAX)
}

impl Folder {
    /// Opens a folder, for which at most `files_max` descriptors are used.
    ///
    /// # Errors
    /// It is not there or no folder, its tag is impossible, or there are too few descriptors.
    pub fn new(share: &FolderShare, files_max: u64) -> Result<Self, ShareError> {
        let tag = share.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG_BYTES_MAX || tag.contains(&0) {
            return Err(ShareError::Tag(share.tag.clone()));
        }
        let path = share.path.clone();
        if files_max < FS_FILES_MIN {
            return Err(ShareError::Files { path, left: files_max });
        }
        let mut bytes = tag.to_vec();
        bytes.resize(TAG_BYTES_MAX, 0);
        // One queue of requests.
        bytes.extend(1u32.to_le_bytes());
        let server = serve(&share.path, share.read_only, files_max);
        let server = server.map_err(|source| ShareError::Folder { path, source })?;
        Ok(Self { server, config: DeviceConfig::new(bytes) })
    }
}

fn serve(path: &Path, read_only: bool, files_max: u64) -> io::Result<Server> {
    let root = Server::open_root(path)?;
    let files = usize::try_from(files_max).unwrap_or(usize::MAX);
    Ok(Server::new(root, read_only, files)?)
}

impl Device for Folder {
    fn info(&self) -> Info {
        Info {
            device_type: 26,
            class: 0x01_8000,
            features: 0,
            queue_sizes: vec![URGENT_QUEUE_SIZE, REQUEST_QUEUE_SIZE],
            name: "virtio-fs",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn confinement(&self) -> Kind {
        Kind::Files
    }

    fn start(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        if let Err(errno) = sys::own_umask() {
            tracing::warn!(
                error = &errno as &dyn std::error::Error,
                "new files in shared folders have less permissions, by this process' umask"
            );
        }
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, index: usize) -> Result<(), DeviceError> {
        context.serve(index, |queue, memory, chain| {
            let written = self.server.handle(memory, chain)?;
            queue.push(chain.head(), written)?;
            // Whoever waits for this one does not wait for the next.
            Ok(queue.signal()?)
        })
    }

    fn stop(&mut self, _context: &mut Context) {
        self.server.forget_all();
    }
}
