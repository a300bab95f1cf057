//! What a format writes to: a file, or in tests something that remembers each write.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::lock::lock;

/// Bytes with offsets.
pub trait Storage: Debug + Send + Sync {
    /// Reads; less than asked for only at the end.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of it, beyond the end too.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Waits until all that was written would survive a loss of power. Nothing that is written
    /// afterwards gets to the disk before it.
    ///
    /// # Errors
    /// The system's; what was written before may be lost then.
    fn sync(&self) -> io::Result<()>;

    /// Gives space back to the host. What is read there afterwards is not defined.
    ///
    /// # Errors
    /// The system's.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Where the file ends.
    ///
    /// # Errors
    /// The system's.
    fn size(&self) -> io::Result<u64>;

    /// How many bytes from here on are known to be zero without reading them.
    fn hole(&self, _offset: u64) -> u64 {
        0
    }

    /// Lets others read beside it: nothing is written to it any more.
    ///
    /// # Errors
    /// The system's.
    fn share(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Storage for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match FileExt::read_at(self, rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self, flags, offset, len) {
            // A file system that cannot keeps the space.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn size(&self) -> io::Result<u64> {
        // Block devices have no length in their metadata.
        Ok(seek(self, SeekFrom::End(0))?)
    }

    fn hole(&self, offset: u64) -> u64 {
        match seek(self, SeekFrom::Data(offset)) {
            Ok(data) => data.saturating_sub(offset),
            // No data up to the end.
            Err(Errno::NXIO) => u64::MAX - offset,
            Err(_) => 0,
        }
    }

    fn share(&self) -> io::Result<()> {
        lock(self, true)
    }
}

/// Storage of which somebody else makes sure that it survives a loss of power.
#[derive(Debug)]
pub(crate) struct Unsynced(pub(crate) Arc<dyn Storage>);

impl Storage for Unsynced {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
}

/// Reads all that is asked for; beyond the end there are zeroes.
///
/// # Errors
/// The system's.
pub fn read_padded(storage: &dyn Storage, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let count = storage.read_at(buffer, offset)?;
    buffer.iter_mut().skip(count).for_each(|byte| *byte = 0);
    Ok(())
}

/// Reads all that is asked for.
///
/// # Errors
/// The system's, or the file ends before.
pub fn read_exact(storage: &dyn Storage, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let count = storage.read_at(buffer, offset)?;
    if count == buffer.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
