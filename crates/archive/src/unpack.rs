//! A tar stream as files, without trust in it.
//!
//! Every name in the stream is taken apart here; `..`, absolute names and devices are refused. Each part
//! of a path is opened from the directory before it, and never through a link, whoever made that. What
//! is in the way is removed and not written to, so that no other name of it changes. Directories get
//! their mode and time when nothing more goes into them.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
    futimens, linkat, mkdirat, openat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use crate::error::{ArchiveError, failed};
use crate::limits::{CHUNK_BYTES, HEADERS_BYTES_MAX, HOLE_BYTES, NAME_BYTES_MAX, PATH_BYTES_MAX};
use crate::place::{Coming, place};

/// What is taken over from a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Owner and group, if this process may set them; else its own user has everything.
    pub owners: bool,
    /// Programs that run as their owner or group.
    pub set_id: bool,
}

/// Unpacks what [`crate::pack::pack`] made, where [`crate::place`] says; nothing else is taken.
///
/// # Errors
/// [`ArchiveError`]; what came before stays.
pub fn copy(from: impl Read, destination: &Path, taken: Taken) -> Result<(), ArchiveError> {
    let mut unpacker: Option<(Unpacker, Rename)> = None;
    let mut is_single = false;
    each(from, |entry| {
        let parts = parts(&entry.path_bytes())?;
        let (unpacker, rename) = match &mut unpacker {
            Some(_) if is_single => return Err(refused(entry, "which is not part of the file")),
            Some(there) => there,
            None => {
                let is_directory = entry.header().entry_type() == EntryType::Directory;
                let coming = match parts.as_slice() {
                    [] => Coming::Content,
                    [name] if is_directory => Coming::Directory(name),
                    [name] => Coming::File(name),
                    _ => return Err(refused(entry, "which is not what was asked for")),
                };
                is_single = matches!(coming, Coming::File(_));
                let place = place(destination, coming)?;
                let rename = parts.first().cloned().zip(place.name);
                unpacker.insert((Unpacker::open(&place.directory, taken)?, rename))
            }
        };
        unpacker.take(entry, &renamed(parts, rename.as_ref(), entry)?, rename.as_ref())
    })?;
    match unpacker {
        Some((mut unpacker, _)) => unpacker.settle(&[]),
        None => Err(ArchiveError::Empty),
    }
}

/// Unpacks any stream into a directory that is there.
///
/// # Errors
/// [`ArchiveError`]; what came before stays.
pub fn extract(from: impl Read, directory: &Path, taken: Taken) -> Result<(), ArchiveError> {
    let mut unpacker = Unpacker::open(directory, taken)?;
    each(from, |entry| {
        let parts = parts(&entry.path_bytes())?;
        unpacker.take(entry, &parts, None)
    })?;
    unpacker.settle(&[])
}

/// The first name in the stream, and what it is to be.
type Rename = Option<(OsString, OsString)>;

fn renamed<R: Read>(
    mut parts: Vec<OsString>,
    rename: Option<&(OsString, OsString)>,
    entry: &Entry<'_, R>,
) -> Result<Vec<OsString>, ArchiveError> {
    match (parts.first_mut(), rename) {
        (Some(first), Some((from, to))) if first == from => first.clone_from(to),
        (_, Some(_)) => return Err(refused(entry, "which is not part of what was asked for")),
        (_, None) => {}
    }
    Ok(parts)
}

/// Bytes that may still be read before the next content.
struct Bounded<R> {
    from: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        match self.left.get().checked_sub(count as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other("the head of a file is too long")),
        }
        Ok(count)
    }
}

fn each<R: Read>(
    from: R,
    mut act: impl FnMut(&mut Entry<'_, Bounded<R>>) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let left = Rc::new(Cell::new(HEADERS_BYTES_MAX));
    let mut archive = Archive::new(Bounded { from, left: Rc::clone(&left) });
    for entry in archive.entries().map_err(ArchiveError::Damaged)? {
        let mut entry = entry.map_err(ArchiveError::Damaged)?;
        left.set(u64::MAX);
        act(&mut entry)?;
        left.set(HEADERS_BYTES_MAX);
    }
    Ok(())
}

fn refused<R: Read>(entry: &Entry<'_, R>, reason: &'static str) -> ArchiveError {
    bad(&entry.path_bytes(), reason)
}

fn bad(name: &[u8], reason: &'static str) -> ArchiveError {
    ArchiveError::Entry { name: String::from_utf8_lossy(name).into_owned(), reason }
}

/// The names in a path that stays where it begins.
fn parts(path: &[u8]) -> Result<Vec<OsString>, ArchiveError> {
    if path.starts_with(b"/") {
        return Err(bad(path, "which is an absolute path"));
    }
    if path.len() > PATH_BYTES_MAX || path.contains(&0) {
        return Err(bad(path.get(..80).unwrap_or(path), "which is no path"));
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(bad(path, "which leads out of the destination")),
            _ if part.len() > NAME_BYTES_MAX => return Err(bad(path, "which is too long a name")),
            _ => parts.push(OsStr::from_bytes(part).to_owned()),
        }
    }
    Ok(parts)
}

/// What is set at last.
#[derive(Clone, Debug)]
struct Meta {
    mode: u32,
    owner: Option<(Uid, Gid)>,
    modified: Timestamps,
}

struct Unpacker {
    root: OwnedFd,
    /// For messages.
    shown: PathBuf,
    taken: Taken,
    /// Directories that were made, each in the one before.
    open: Vec<(Vec<OsString>, Meta)>,
}

impl Unpacker {
    fn open(directory: &Path, taken: Taken) -> Result<Self, ArchiveError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, directory, flags, Mode::empty());
        let root = root.map_err(failed("opening", directory))?;
        let taken = Taken { owners: taken.owners && rustix::process::geteuid().is_root(), ..taken };
        Ok(Self { root, shown: directory.to_owned(), taken, open: Vec::new() })
    }

    fn shown(&self, parts: &[OsString]) -> PathBuf {
        self.shown.join(parts.iter().collect::<PathBuf>())
    }

    fn take<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        parts: &[OsString],
        rename: Option<&(OsString, OsString)>,
    ) -> Result<(), ArchiveError> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        self.settle(parts)?;
        let Some((name, above)) = parts.split_last() else {
            // The destination itself, which is there.
            return match kind {
                EntryType::Directory => Ok(()),
                _ => Err(refused(entry, "which is no directory")),
            };
        };
        let meta = self.meta(entry)?;
        match kind {
            EntryType::Directory => self.directory(parts, meta),
            EntryType::Regular | EntryType::Continuous => {
                let parent = self.parent(above, true)?;
                self.file(entry, &parent, name, parts, meta)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                let parent = self.parent(above, true)?;
                self.symlink(&target, &parent, name, parts, meta)
            }
            EntryType::Link => {
                let target = self::parts(&entry.link_name_bytes().unwrap_or_default())?;
                let target = renamed(target, rename, entry)?;
                let parent = self.parent(above, true)?;
                self.link(&target, &parent, name, parts)
            }
            EntryType::Block | EntryType::Char => Err(refused(entry, "which is a device")),
            EntryType::Fifo => Err(refused(entry, "which is a pipe")),
            EntryType::GNUSparse => {
                Err(refused(entry, "which is in pieces; try tar without --sparse"))
            }
            _ => Err(refused(entry, "which is of a kind that is not known")),
        }
    }

    fn meta<R: Read>(&self, entry: &Entry<'_, R>) -> Result<Meta, ArchiveError> {
        let header = entry.header();
        let damaged = |_| refused(entry, "which has a damaged head");
        let mask = if self.taken.set_id { 0o7777 } else { 0o1777 };
        let number = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        let owner = match self.taken.owners {
            false => None,
            true => {
                let ids = number(header.uid().map_err(damaged)?)
                    .zip(number(header.gid().map_err(damaged)?));
                let (uid, gid) =
                    ids.ok_or_else(|| refused(entry, "whose owner is none that Linux has"))?;
                Some((Uid::from_raw(uid), Gid::from_raw(gid)))
            }
        };
        let seconds = i64::try_from(header.mtime().map_err(damaged)?).unwrap_or(i64::MAX);
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        Ok(Meta {
            mode: header.mode().map_err(damaged)? & mask,
            owner,
            modified: Timestamps { last_access: time, last_modification: time },
        })
    }

    /// Opens a directory below the destination; those that are missing are made if `make` says so.
    fn parent(&self, parts: &[OsString], make: bool) -> Result<OwnedFd, ArchiveError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at = openat(&self.root, ".", flags, Mode::empty())
            .map_err(failed("opening", &self.shown))?;
        for (index, part) in parts.iter().enumerate() {
            let shown = || self.shown(parts.get(..=index).unwrap_or_default());
            let opened = match openat(&at, part, flags, Mode::empty()) {
                Err(Errno::NOENT) if make => {
                    match mkdirat(&at, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(failed("making", &shown())(errno)),
                    }
                    openat(&at, part, flags, Mode::empty())
                }
                opened => opened,
            };
            at = opened.map_err(|errno| match errno {
                Errno::NOTDIR | Errno::LOOP => ArchiveError::Destination {
                    path: shown(),
                    reason: "is no directory; what a link leads to is not taken for one",
                },
                errno => failed("opening", &shown())(errno),
            })?;
        }
        Ok(at)
    }

    fn directory(&mut self, parts: &[OsString], meta: Meta) -> Result<(), ArchiveError> {
        let Some((name, above)) = parts.split_last() else { return Ok(()) };
        let parent = self.parent(above, true)?;
        match mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => {
                self.open.push((parts.to_vec(), meta));
                Ok(())
            }
            // One that is there stays as it is.
            Err(Errno::EXIST) => self.parent(parts, false).map(drop),
            Err(errno) => Err(failed("making", &self.shown(parts))(errno)),
        }
    }

    /// Gives directories into which nothing more goes what they are to have at last.
    fn settle(&mut self, next: &[OsString]) -> Result<(), ArchiveError> {
        while let Some((parts, _)) = self.open.last()
            && !(next.len() > parts.len() && next.starts_with(parts))
        {
            let Some((parts, meta)) = self.open.pop() else { return Ok(()) };
            let Some((name, above)) = parts.split_last() else { continue };
            let shown = self.shown(&parts);
            let parent = self.parent(above, false)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = openat(&parent, name, flags, Mode::empty());
            finish(&directory.map_err(failed("opening", &shown))?, &meta, &shown)?;
        }
        Ok(())
    }

    /// Removes what has this name, unless it is a directory.
    fn clear(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        parts: &[OsString],
    ) -> Result<(), ArchiveError> {
        match unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(ArchiveError::Destination {
                path: self.shown(parts),
                reason: "is a directory already",
            }),
            Err(errno) => Err(failed("replacing", &self.shown(parts))(errno)),
        }
    }

    fn file<R: Read>(
        &self,
        entry: &mut Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        parts: &[OsString],
        meta: Meta,
    ) -> Result<(), ArchiveError> {
        self.clear(parent, name, parts)?;
        let shown = self.shown(parts);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(parent, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(file.map_err(failed("making", &shown))?);
        let size = entry.size();
        let mut done = 0;
        let mut chunk = vec![0; CHUNK_BYTES];
        while done < size {
            let want = usize::try_from(size - done).unwrap_or(usize::MAX).min(chunk.len());
            let piece = chunk.get_mut(..want).unwrap_or_default();
            entry.read_exact(piece).map_err(ArchiveError::Damaged)?;
            write_sparse(&mut file, piece).map_err(failed("writing", &shown))?;
            done += want as u64;
        }
        // What ends in zeroes has not been written to its end.
        file.set_len(size).map_err(failed("writing", &shown))?;
        finish(&file, &meta, &shown)
    }

    fn symlink(
        &self,
        target: &[u8],
        parent: &OwnedFd,
        name: &OsStr,
        parts: &[OsString],
        meta: Meta,
    ) -> Result<(), ArchiveError> {
        let shown = self.shown(parts);
        if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
            let name = shown.as_os_str().as_bytes();
            return Err(bad(name, "which is a link that leads nowhere"));
        }
        self.clear(parent, name, parts)?;
        let made = symlinkat(OsStr::from_bytes(target), parent, name);
        made.map_err(failed("making", &shown))?;
        if let Some((uid, gid)) = meta.owner {
            let given = chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
            given.map_err(failed("giving away", &shown))?;
        }
        let dated = utimensat(parent, name, &meta.modified, AtFlags::SYMLINK_NOFOLLOW);
        dated.map_err(failed("dating", &shown))
    }

    /// Another name of a file in the destination.
    fn link(
        &self,
        target: &[OsString],
        parent: &OwnedFd,
        name: &OsStr,
        parts: &[OsString],
    ) -> Result<(), ArchiveError> {
        let shown = self.shown(parts);
        let Some((old, above)) = target.split_last().filter(|_| target != parts) else {
            return Err(bad(shown.as_os_str().as_bytes(), "which is a link to itself"));
        };
        let beside = self.parent(above, false)?;
        let found = statat(&beside, old, AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(failed("reading", &self.shown(target)))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            let name = shown.as_os_str().as_bytes();
            return Err(bad(name, "which is another name of what is no file"));
        }
        self.clear(parent, name, parts)?;
        let linked = linkat(&beside, old, parent, name, AtFlags::empty());
        linked.map_err(failed("linking", &shown))
    }
}

/// Owner first: a change of it takes bits of the mode away.
fn finish(file: &impl AsFd, meta: &Meta, shown: &Path) -> Result<(), ArchiveError> {
    if let Some((uid, gid)) = meta.owner {
        fchown(file, Some(uid), Some(gid)).map_err(failed("giving away", shown))?;
    }
    fchmod(file, Mode::from_raw_mode(meta.mode)).map_err(failed("setting the mode of", shown))?;
    futimens(file, &meta.modified).map_err(failed("dating", shown))
}

/// Writes, and leaves holes where there are only zeroes.
fn write_sparse(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    for piece in bytes.chunks(HOLE_BYTES) {
        if piece.len() == HOLE_BYTES && piece.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(i64::try_from(piece.len()).unwrap_or(i64::MAX)))?;
        } else {
            file.write_all(piece)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
