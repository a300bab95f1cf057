//! Throwaway copies of root disks: the guest writes into its own, which is gone when it ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::store::{Store, StoreError, failed};

/// A disk without a name: it exists as long as this does.
#[derive(Debug)]
pub struct ThrowawayDisk {
    file: File,
}

impl ThrowawayDisk {
    /// Copies a disk: by sharing its blocks where the file system can, else its data without the
    /// holes.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn copy_of(original: &Path, store: &Store) -> Result<Self, StoreError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = store.temporary().join(format!("disk-{}-{number}", std::process::id()));
        let from = File::open(original).map_err(failed("opening", original))?;
        let options = File::options().read(true).write(true).create_new(true).open(&path);
        let file = options.map_err(failed("creating", &path))?;
        // Removed at once: however this process ends, nothing is left behind.
        fs::remove_file(&path).map_err(failed("removing", &path))?;
        copy_sparse(&from, &file).map_err(failed("copying", original))?;
        Ok(Self { file })
    }

    /// A path under which this process can open the disk.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// Copies a whole file into an empty one, keeping its holes.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole to the end.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data))?;
        copy_range(from, to, data, hole)?;
        at = hole;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, begin: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (begin, begin);
    while read_at < end {
        let left = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                return copy_through_memory(from, to, read_at, end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; 1 << 20];
    while at < end {
        let wanted = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let part = buffer.get_mut(..wanted).unwrap_or_default();
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn copies_have_the_bytes_and_the_holes() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let path = directory.path().join("original");
        let original = File::create(&path).unwrap();
        original.set_len(64 << 20).unwrap();
        original.write_all_at(b"begin", 0).unwrap();
        original.write_all_at(&vec![7; 300_000], 30 << 20).unwrap();
        original.write_all_at(b"end", (64 << 20) - 3).unwrap();
        original.sync_all().unwrap();
        let copy = ThrowawayDisk::copy_of(&path, &store).unwrap();
        assert!(fs::read(copy.path()).unwrap() == fs::read(&path).unwrap());
        assert!(copy.file.metadata().unwrap().blocks() * 512 < 2 << 20);
        let mut writable = File::options().read(true).write(true).open(copy.path()).unwrap();
        writable.write_all(b"BEGIN").unwrap();
        writable.rewind().unwrap();
        let mut back = [0; 5];
        writable.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"BEGIN");
        assert_eq!(&fs::read(&path).unwrap()[..5], b"begin");
        assert_eq!(fs::read_dir(store.temporary()).unwrap().count(), 0);
        let (from, to) = (File::open(&path).unwrap(), tempfile::tempfile().unwrap());
        copy_through_memory(&from, &to, 1, 4).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 4);
    }
}
