//! Logs that do not grow without limit: one that is full is renamed to `NAME.1`, over the one before,
//! and another is begun.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::folder::own_file;

/// Bytes of a log before another one is begun; one old one is kept.
pub const LOG_BYTES_MAX: u64 = 4 << 20;
/// What is behind the name of the old one.
pub const BEFORE: &str = "1";

/// A log that this process alone writes.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Log {
    /// Opens it; what is there stays.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = own_file().append(true).open(&path)?;
        let len = file.metadata()?.len();
        Ok(Self { path, file, len })
    }

    /// Writes all of it into one file.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + bytes.len() as u64 > LOG_BYTES_MAX {
            *self = Self { file: renew(&self.path)?, path: std::mem::take(&mut self.path), len: 0 };
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// The last bytes of it.
    ///
    /// # Errors
    /// The system's.
    pub fn tail(&self, bytes: u64) -> io::Result<Vec<u8>> {
        tail(&self.path, bytes)
    }
}

/// The last bytes of a file.
///
/// # Errors
/// The system's.
pub fn tail(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(end.saturating_sub(bytes)))?;
    let mut text = Vec::new();
    file.take(bytes).read_to_end(&mut text)?;
    Ok(text)
}

/// Opens a log for a process that is started, as its standard error; a full one is renamed before.
///
/// # Errors
/// The system's.
pub fn for_process(path: &Path) -> io::Result<File> {
    let file = own_file().append(true).open(path)?;
    if file.metadata()?.len() < LOG_BYTES_MAX { Ok(file) } else { renew(path) }
}

fn renew(path: &Path) -> io::Result<File> {
    fs::rename(path, path.with_added_extension(BEFORE))?;
    own_file().append(true).open(path)
}

/// Standard error. Where it leads to a log of ours, that is limited; whatever else writes there, as
/// this process's children do, is counted too.
#[derive(Debug)]
pub struct Stderr {
    log: Option<Place>,
}

/// A file in a directory that may be renamed.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    _directory: OwnedFd,
}

impl Stderr {
    /// Standard error, and the log it may lead to.
    #[must_use]
    pub fn new(log: &Path) -> Self {
        let place = || {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(log.parent()?, flags, Mode::empty()).ok()?;
            let inside = format!("/proc/self/fd/{}", directory.as_raw_fd());
            Some(Place { path: Path::new(&inside).join(log.file_name()?), _directory: directory })
        };
        Self { log: place() }
    }

    /// Standard error as it is.
    #[must_use]
    pub fn plain() -> Self {
        Self { log: None }
    }

    fn limit(place: &Place) -> io::Result<()> {
        let stderr = rustix::fs::fstat(rustix::stdio::stderr())?;
        if u64::try_from(stderr.st_size).unwrap_or(0) < LOG_BYTES_MAX {
            return Ok(());
        }
        let there = fs::symlink_metadata(&place.path)?;
        if (there.dev(), there.ino()) == (stderr.st_dev, stderr.st_ino) {
            rustix::stdio::dup2_stderr(renew(&place.path)?)?;
        }
        Ok(())
    }
}

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whole lines come, and are not torn apart.
        io::stderr().write_all(bytes)?;
        if let Some(place) = &self.log {
            // It goes on where it is otherwise.
            let _ = Self::limit(place);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(path.clone()).unwrap();
        for i in 0..40u8 {
            log.write(&vec![i; 1 << 18]).unwrap();
        }
        let (old, new) = (path.with_added_extension(BEFORE), path);
        assert!(fs::metadata(&old).unwrap().len() <= LOG_BYTES_MAX);
        assert_eq!(log.tail(1).unwrap(), [39]);
        let both = fs::metadata(old).unwrap().len() + fs::metadata(&new).unwrap().len();
        assert!(both > LOG_BYTES_MAX && both <= 2 * LOG_BYTES_MAX);
        // Two that start one after the other.
        fs::write(&new, vec![0; 4 << 20]).unwrap();
        assert_eq!(for_process(&new).unwrap().metadata().unwrap().len(), 0);
        (&for_process(&new).unwrap()).write_all(b"x").unwrap();
        assert_eq!(for_process(&new).unwrap().metadata().unwrap().len(), 1);
    }
}
