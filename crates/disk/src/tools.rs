//! What `berth disk` does with files that no machine uses.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::chain::{Access, Layer, backing_of, open, open_file, open_image};
use crate::error::{DiskError, failed};
use crate::format::Format;
use crate::limits::CONVERT_BYTES;
use crate::lock::lock;
use crate::qcow2::check::{Report, check};
use crate::qcow2::create::NewImage;
use crate::qcow2::header::{BackingName, HeaderError};
use crate::storage::Storage;

/// Disks are in whole sectors.
const SECTOR: u64 = 512;

/// What is below a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, relative to the new image's directory.
    pub name: String,
    /// What it holds.
    pub format: Format,
}

/// Makes a disk; without a size it is as large as what is below it. It survives a loss of power if its
/// name does, for which the caller syncs the directory.
///
/// # Errors
/// There is such a file, the size is impossible, or it cannot be written. Nothing is left behind.
pub fn create(
    path: &Path,
    format: Format,
    size: Option<u64>,
    backing: Option<&Backing>,
) -> Result<(), DiskError> {
    let file = create_unsynced(path, format, size, backing)?;
    let synced = file.sync_all().map_err(failed("making", path));
    synced.inspect_err(|_| drop(fs::remove_file(path)))
}

/// The same without waiting for the disk, which is left to the caller. The file is locked as long as it
/// is open.
///
/// # Errors
/// As [`create`].
pub fn create_unsynced(
    path: &Path,
    format: Format,
    size: Option<u64>,
    backing: Option<&Backing>,
) -> Result<Arc<File>, DiskError> {
    let mut size = size;
    if let Some(Backing { name, format: below }) = backing {
        if format == Format::Raw {
            return Err(DiskError::NoSuch { path: path.to_owned(), format, what: "backing file" });
        }
        let named = BackingName { name: name.clone(), format: Some(below.to_string()) };
        if let Some((path, format)) = backing_of(path, Some(&named))? {
            // The whole chain is opened: what is refused later is better refused now.
            let layer = open(&path, format, Access::Look)?;
            size = size.or(Some(layer.size().next_multiple_of(SECTOR)));
        }
    }
    let size = check_size(path, size.unwrap_or_default())?;
    let file = Arc::new(new_file(path)?);
    let made = match format {
        Format::Raw => file.set_len(size).map_err(failed("making", path)),
        Format::Qcow2 => {
            let backing = backing.map(|backing| (backing.name.clone(), backing.format));
            let new = NewImage { backing, ..NewImage::new(size) };
            new.write_unsynced(Arc::clone(&file) as _).map_err(refused(path))
        }
    };
    made.map(|()| file).inspect_err(|_| drop(fs::remove_file(path)))
}

pub(crate) fn refused(path: &Path) -> impl FnOnce(HeaderError) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Image { path, source }
}

fn check_size(path: &Path, size: u64) -> Result<u64, DiskError> {
    let refuse = |reason: &str| {
        Err(DiskError::Size { path: path.to_owned(), size, reason: reason.to_owned() })
    };
    match size {
        0 => refuse("it would be empty"),
        _ if !size.is_multiple_of(SECTOR) => refuse("it must be a multiple of 512"),
        _ if size > i64::MAX as u64 => refuse("no file is so large"),
        _ => Ok(size),
    }
}

pub(crate) fn new_file(path: &Path) -> Result<File, DiskError> {
    let opened = OpenOptions::new().read(true).write(true).create_new(true).open(path);
    let file = opened.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => DiskError::Exists { path: path.to_owned() },
        _ => DiskError::File { operation: "making", path: path.to_owned(), source },
    })?;
    let locked = |source| DiskError::Locked { path: path.to_owned(), source };
    lock(&file, false).map_err(locked)?;
    Ok(file)
}

/// Changes the size of a disk. What is new reads as zeroes; a smaller one is only made when that is
/// asked for, since the end is lost.
///
/// # Errors
/// It is in use, the size is impossible, or it cannot be written.
pub fn resize(path: &Path, format: Format, size: u64, shrink: bool) -> Result<(), DiskError> {
    let size = check_size(path, size)?;
    let refuse = |old: u64| match size < old && !shrink {
        true => Err(DiskError::Size {
            path: path.to_owned(),
            size,
            reason: format!("it has {old}, and the end would be lost; try --shrink"),
        }),
        false => Ok(()),
    };
    match format {
        Format::Raw => {
            let file = open_file(path, Access::Write)?;
            refuse(Storage::size(&file).map_err(failed("measuring", path))?)?;
            file.set_len(size).and_then(|()| file.sync_all()).map_err(failed("resizing", path))
        }
        Format::Qcow2 => {
            let mut image = open_image(path, Access::Write)?;
            refuse(image.size())?;
            image.resize(size).map_err(failed("resizing", path))
        }
    }
}

/// Copies what a guest sees of a disk into a new one without anything below it. What is zero takes no
/// space.
///
/// # Errors
/// The disk is in use or damaged, or the new one is there or cannot be written; then nothing of it is.
pub fn convert(from: (&Path, Format), to: (&Path, Format)) -> Result<(), DiskError> {
    let source = open(from.0, from.1, Access::Read)?;
    if to.0.exists() {
        return Err(DiskError::Exists { path: to.0.to_owned() });
    }
    let mut name = to.0.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let work = to.0.with_file_name(name);
    let made = convert_into(&source, from.0, (&work, to.1)).and_then(|()| {
        name_file(&work, to.0).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => DiskError::Exists { path: to.0.to_owned() },
            _ => DiskError::File { operation: "naming", path: to.0.to_owned(), source },
        })
    });
    made.inspect_err(|_| drop(fs::remove_file(&work)))
}

/// Gives a file its name without replacing what somebody else made meanwhile.
fn name_file(work: &Path, name: &Path) -> io::Result<()> {
    match renameat_with(CWD, work, CWD, name, RenameFlags::NOREPLACE) {
        // Not every file system can.
        Err(Errno::INVAL | Errno::NOSYS) if !name.exists() => fs::rename(work, name),
        result => Ok(result?),
    }
}

fn convert_into(source: &Layer, from: &Path, to: (&Path, Format)) -> Result<(), DiskError> {
    let size = source.size().next_multiple_of(SECTOR);
    create(to.0, to.1, Some(size), None)?;
    let target = match to.1 {
        Format::Raw => Target::Raw(open_file(to.0, Access::Write)?),
        Format::Qcow2 => Target::Qcow2(Box::new(open_image(to.0, Access::Write)?)),
    };
    let mut buffer = vec![0; CONVERT_BYTES];
    let mut at = 0;
    while at < source.size() {
        let left = source.size() - at;
        let (is_zero, run) = source.extent(at, left).map_err(failed("reading", from))?;
        if is_zero {
            at += run;
            continue;
        }
        let count = run.min(CONVERT_BYTES as u64);
        let part = buffer.get_mut(..count as usize).unwrap_or_default();
        source.read_padded(at, part).map_err(failed("reading", from))?;
        target.write_sparse(at, part).map_err(failed("writing", to.0))?;
        at += count;
    }
    target.finish().map_err(failed("writing", to.0))
}

enum Target {
    Raw(File),
    Qcow2(Box<crate::qcow2::image::Image>),
}

impl Target {
    /// Leaves out pieces of zeroes, of which there are none before.
    fn write_sparse(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let piece = match self {
            Self::Raw(_) => 4096,
            Self::Qcow2(image) => image.header().cluster_bytes(),
        };
        let mut at = at;
        let mut rest = bytes;
        while !rest.is_empty() {
            // The first may begin within a piece.
            let count = (piece - at % piece).min(rest.len() as u64);
            let (part, more) = rest.split_at(count as usize);
            if part.iter().any(|byte| *byte != 0) {
                match self {
                    Self::Raw(file) => Storage::write_at(file, part, at)?,
                    Self::Qcow2(image) => image.write(at, part)?,
                }
            }
            (at, rest) = (at + count, more);
        }
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.sync_all(),
            Self::Qcow2(image) => image.flush(),
        }
    }
}

/// Checks an image that nobody writes.
///
/// # Errors
/// It is in use, or cannot be read at all; a raw disk has nothing to be checked.
pub fn check_disk(path: &Path, format: Format) -> Result<Report, DiskError> {
    if format == Format::Raw {
        return Err(DiskError::NoSuch { path: path.to_owned(), format, what: "tables to check" });
    }
    let file = open_file(path, Access::Read)?;
    check(&file).map_err(refused(path))
}

/// A name for a backing file that is given relative to the working directory, as a header has it:
/// relative to the image's directory.
///
/// # Errors
/// A directory is not there, or the name is no text.
pub fn backing_name(image: &Path, backing: &Path) -> Result<String, DiskError> {
    let absolute = |path: &Path| fs::canonicalize(path).map_err(failed("finding", path));
    let parent = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let there = absolute(backing)?;
    let name = match there.strip_prefix(absolute(&parent(image))?) {
        Ok(below) => below.to_owned(),
        Err(_) => there,
    };
    name.to_str().map(str::to_owned).ok_or_else(|| DiskError::Backing {
        path: image.to_owned(),
        backing: name.display().to_string(),
        reason: "its name is no text".to_owned(),
    })
}
