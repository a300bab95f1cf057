//! Opening disks: the file, what it is based on, and their locks.
//!
//! The topmost file is locked for writing or for reading, those below always for reading, so that no
//! other machine can write what this one reads.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{DiskError, failed};
use crate::format::Format;
use crate::limits::CHAIN_LAYERS_MAX;
use crate::lock::lock;
use crate::qcow2::header::{BackingName, Header, HeaderError};
use crate::qcow2::image::Image;
use crate::storage::{Storage, read_padded};

/// An open disk, or one below it.
#[derive(Debug)]
pub enum Layer {
    /// A raw file.
    Raw {
        /// The file.
        storage: Box<dyn Storage>,
        /// Its length.
        size: u64,
    },
    /// An image.
    Qcow2(Arc<Image>),
}

impl Layer {
    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(image) => image.size(),
        }
    }

    /// Reads; beyond the end there are zeroes.
    ///
    /// # Errors
    /// The file cannot be read, or the image is damaged there.
    pub fn read_padded(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = self.size().saturating_sub(offset).min(buffer.len() as u64);
        let (part, rest) = buffer.split_at_mut(there as usize);
        rest.fill(0);
        match self {
            Self::Raw { storage, .. } => read_padded(&**storage, part, offset),
            Self::Qcow2(image) => image.read(offset, part),
        }
    }

    /// Whether a range is known to be zero, and how many bytes this holds for.
    ///
    /// # Errors
    /// As reading.
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        let there = self.size().saturating_sub(offset).min(len);
        match self {
            _ if there == 0 => Ok((true, len)),
            Self::Qcow2(image) => image.extent(offset, there),
            Self::Raw { storage, .. } => match storage.hole(offset) {
                0 => Ok((false, there)),
                hole => Ok((true, hole.min(there))),
            },
        }
    }
}

/// A file of a chain, as `info` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Where it is.
    pub path: PathBuf,
    /// What it holds.
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes it takes on the host.
    pub allocated: u64,
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only to look at: nothing is locked.
    Look,
    /// For reading, beside other readers.
    Read,
    /// For writing, alone.
    Write,
}

/// Opens one file and locks it. A pipe does not block.
///
/// # Errors
/// It is not there, is no file, or somebody else uses it.
pub fn open_file(path: &Path, access: Access) -> Result<File, DiskError> {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::Write).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed("opening disk", path))?;
    let kind = file.metadata().map_err(failed("opening disk", path))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::Kind { path: path.to_owned() });
    }
    if access != Access::Look {
        lock(&file, access == Access::Read)
            .map_err(|source| DiskError::Locked { path: path.to_owned(), source })?;
    }
    Ok(file)
}

/// Opens an image for a machine, with what is below it.
///
/// # Errors
/// A file is not there, in use, damaged, or of a kind that is not supported.
pub fn open_image(path: &Path, access: Access) -> Result<Image, DiskError> {
    let mut seen = Vec::new();
    open_image_seen(path, access, &mut seen)
}

/// Opens a disk of any format.
///
/// # Errors
/// As [`open_image`].
pub fn open(path: &Path, format: Format, access: Access) -> Result<Layer, DiskError> {
    open_seen(path, format, access, &mut Vec::new())
}

type Seen = Vec<(u64, u64)>;

fn open_seen(
    path: &Path,
    format: Format,
    access: Access,
    seen: &mut Seen,
) -> Result<Layer, DiskError> {
    match format {
        Format::Qcow2 => Ok(Layer::Qcow2(Arc::new(open_image_seen(path, access, seen)?))),
        Format::Raw => {
            let file = open_file(path, access)?;
            note(path, &file, seen)?;
            let size = Storage::size(&file).map_err(failed("measuring", path))?;
            Ok(Layer::Raw { storage: Box::new(file), size })
        }
    }
}

fn open_image_seen(path: &Path, access: Access, seen: &mut Seen) -> Result<Image, DiskError> {
    let file = open_file(path, access)?;
    note(path, &file, seen)?;
    let refused = |source| DiskError::Image { path: path.to_owned(), source };
    let header = Header::read(&file).map_err(refused)?;
    let below = if access == Access::Look { Access::Look } else { Access::Read };
    let backing = match backing_of(path, header.backing.as_ref())? {
        Some((path, format)) => Some(Box::new(open_seen(&path, format, below, seen)?)),
        None => None,
    };
    Image::open(Box::new(file), access == Access::Write, backing).map_err(refused)
}

/// Refuses loops and chains without end.
fn note(path: &Path, file: &File, seen: &mut Seen) -> Result<(), DiskError> {
    let meta = file.metadata().map_err(failed("opening disk", path))?;
    let identity = (meta.dev(), meta.ino());
    if seen.contains(&identity) {
        return Err(DiskError::Loop { path: path.to_owned() });
    }
    if seen.len() >= CHAIN_LAYERS_MAX {
        return Err(DiskError::Deep { path: path.to_owned() });
    }
    seen.push(identity);
    Ok(())
}

/// Where the backing file is and what it holds. The header must say it: who guesses can be deceived
/// by what a guest wrote into a raw file.
///
/// # Errors
/// It does not say the format, or what it says is not supported.
pub fn backing_of(
    path: &Path,
    backing: Option<&BackingName>,
) -> Result<Option<(PathBuf, Format)>, DiskError> {
    let Some(BackingName { name, format }) = backing else { return Ok(None) };
    let refused = |reason: String| DiskError::Backing {
        path: path.to_owned(),
        backing: name.clone(),
        reason,
    };
    let Some(format) = format else {
        return Err(DiskError::NoBackingFormat { path: path.to_owned(), backing: name.clone() });
    };
    let format: Format = format.parse().map_err(refused)?;
    // QEMU takes `json:` and protocols before a colon.
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(refused("only names of files are supported".to_owned()));
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    Ok(Some((directory.join(name), format)))
}

/// The files of a disk from the top, looked at without locks.
///
/// # Errors
/// As opening; in a damaged chain those that could be read are lost.
pub fn describe(path: &Path, format: Format) -> Result<Vec<LayerInfo>, DiskError> {
    let mut layers = Vec::new();
    let mut seen = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next.take() {
        let file = open_file(&path, Access::Look)?;
        note(&path, &file, &mut seen)?;
        let meta = file.metadata().map_err(failed("measuring", &path))?;
        let size = match format {
            Format::Raw => Storage::size(&file).map_err(failed("measuring", &path))?,
            Format::Qcow2 => {
                let refused = |source: HeaderError| DiskError::Image { path: path.clone(), source };
                let header = Header::read(&file).map_err(refused)?;
                next = backing_of(&path, header.backing.as_ref())?;
                header.size
            }
        };
        layers.push(LayerInfo { path, format, size, allocated: meta.blocks() * 512 });
    }
    Ok(layers)
}
