//! A file or a folder as a tar stream.
//!
//! Its first entry is what was asked for, under its last name; or `.`, when the path ends in `/.`: then
//! what is in the folder is meant, and not the folder.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header};

use crate::error::{ArchiveError, failed};
use crate::limits::LINKS_MAX;

/// Something that is not in the stream as it is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Which.
    pub path: PathBuf,
    /// What about it.
    pub what: &'static str,
}

/// Writes `source`, with everything in it, as a tar stream. What cannot be in one is noted, and the rest
/// goes on.
///
/// # Errors
/// [`ArchiveError`]; then the stream has no end.
pub fn pack(to: impl Write, source: &Path, note: &mut dyn FnMut(Note)) -> Result<(), ArchiveError> {
    let bytes = source.as_os_str().as_bytes();
    let is_content = bytes == b"." || bytes.ends_with(b"/.") || source.file_name().is_none();
    let name = match source.file_name() {
        Some(name) if !is_content => PathBuf::from(name),
        _ => ".".into(),
    };
    // With a slash behind it a link is what it leads to.
    let follows = is_content || bytes.ends_with(b"/");
    let meta = if follows { fs::metadata(source) } else { fs::symlink_metadata(source) };
    let meta = meta.map_err(failed("reading", source))?;
    if follows && !meta.is_dir() {
        let reason = "is no directory";
        return Err(ArchiveError::Destination { path: source.to_owned(), reason });
    }
    let mut packer = Packer { to: Builder::new(to), links: HashMap::new(), note };
    packer.add(source, &name, &meta)?;
    packer.to.finish().map_err(ArchiveError::Output)?;
    packer.to.get_mut().flush().map_err(ArchiveError::Output)
}

struct Packer<'a, W: Write> {
    to: Builder<W>,
    /// Files with several names: device and inode, and the first name.
    links: HashMap<(u64, u64), PathBuf>,
    note: &'a mut dyn FnMut(Note),
}

impl<W: Write> Packer<'_, W> {
    fn add(&mut self, path: &Path, name: &Path, meta: &Metadata) -> Result<(), ArchiveError> {
        let kind = meta.file_type();
        if kind.is_dir() {
            self.add_directory(path, name, meta)
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(failed("reading", path))?;
            let mut header = header(meta, EntryType::Symlink);
            self.to.append_link(&mut header, name, target).map_err(ArchiveError::Output)
        } else if kind.is_file() {
            self.add_file(path, name, meta)
        } else {
            let what = match (kind.is_socket(), kind.is_fifo()) {
                (true, _) => "a socket, is left out",
                (_, true) => "a pipe, is left out",
                _ => "a device, is left out",
            };
            (self.note)(Note { path: path.to_owned(), what });
            Ok(())
        }
    }

    fn add_directory(
        &mut self,
        path: &Path,
        name: &Path,
        meta: &Metadata,
    ) -> Result<(), ArchiveError> {
        let mut head = header(meta, EntryType::Directory);
        // With a slash at its end, as tar has it.
        let written = self.to.append_data(&mut head, name.join(""), io::empty());
        written.map_err(ArchiveError::Output)?;
        let mut names: Vec<OsString> = Vec::new();
        for entry in fs::read_dir(path).map_err(failed("reading", path))? {
            names.push(entry.map_err(failed("reading", path))?.file_name());
        }
        names.sort();
        for inner in names {
            let inner_path = path.join(&inner);
            match fs::symlink_metadata(&inner_path) {
                Ok(meta) => self.add(&inner_path, &name.join(&inner), &meta)?,
                // It was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("reading", &inner_path)(error)),
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, name: &Path, meta: &Metadata) -> Result<(), ArchiveError> {
        if meta.nlink() > 1 {
            let identity = (meta.dev(), meta.ino());
            if let Some(first) = self.links.get(&identity) {
                let mut header = header(meta, EntryType::Link);
                return self.to.append_link(&mut header, name, first).map_err(ArchiveError::Output);
            }
            if self.links.len() < LINKS_MAX {
                self.links.insert(identity, name.to_owned());
            }
        }
        // What has become something else since is not waited for.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let file = opened.map_err(failed("opening", path))?;
        let meta = file.metadata().map_err(failed("reading", path))?;
        if !meta.is_file() {
            (self.note)(Note { path: path.to_owned(), what: "is no file any more, and left out" });
            return Ok(());
        }
        let mut header = header(&meta, EntryType::Regular);
        header.set_size(meta.len());
        let mut exact = Exact { file, left: meta.len(), is_short: false, error: None };
        let written = self.to.append_data(&mut header, name, &mut exact);
        if let Some(error) = exact.error {
            return Err(failed("reading", path)(error));
        }
        written.map_err(ArchiveError::Output)?;
        if exact.is_short {
            (self.note)(Note { path: path.to_owned(), what: "became shorter while it was read" });
        }
        Ok(())
    }
}

fn header(meta: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(meta.uid().into());
    header.set_gid(meta.gid().into());
    // Times before 1970 become that.
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
    header
}

/// As many bytes of a file as its header says, whatever happens to it meanwhile.
struct Exact {
    file: File,
    left: u64,
    is_short: bool,
    error: Option<io::Error>,
}

impl Read for Exact {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let count = match self.file.read(buffer) {
            Ok(0) => {
                self.is_short = true;
                buffer.fill(0);
                buffer.len()
            }
            Ok(count) => count,
            Err(error) => {
                let kind = error.kind();
                if kind != io::ErrorKind::Interrupted {
                    self.error = Some(error);
                }
                return Err(kind.into());
            }
        };
        self.left -= count as u64;
        Ok(count)
    }
}
