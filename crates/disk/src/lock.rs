//! Locks of disk files, so that no writable disk is opened twice.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::limits::{LOCK_RETRY, LOCK_WAIT};

/// What a reader locks: bytes that QEMU locks for reading, and those by which it says that nobody else may
/// write or resize (QEMU, block/file-posix.c: 100 and more what is done, 200 and more what others may
/// not do).
const READER: [(i64, i64); 2] = [(0, 101), (201, 3)];
/// The others, which whoever wrote before has to let go of.
const NOT_READER: [(i64, i64); 2] = [(101, 100), (204, 0)];
/// Bytes of which somebody has one who writes, resizes, or lets nobody read.
const WRITERS: [i64; 3] = [101, 103, 200];

/// Locks a file: shared for readers, else exclusive. Who has one kind may ask for the other.
///
/// It is a lock of the open file description: it also excludes a second opening by the same process,
/// ends with the file, however the process ends, and is seen by QEMU, which locks single bytes: its
/// readers get along with ours.
///
/// A process that was killed a moment ago may still have it, so it is tried for [`LOCK_WAIT`].
///
/// # Errors
/// Somebody else has it.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match if shared { try_to_share(file) } else { set(file, libc::F_WRLCK, (0, 0)) } {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < LOCK_WAIT =>
            {
                std::thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

fn try_to_share(file: &File) -> io::Result<()> {
    for range in READER {
        set(file, libc::F_RDLCK, range)?;
    }
    for range in NOT_READER {
        set(file, libc::F_UNLCK, range)?;
    }
    for byte in WRITERS {
        if is_locked(file, byte)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

/// So many bytes from the first; 0 are all.
fn range(kind: i32, (first, count): (i64, i64)) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: first,
        l_len: count,
        l_pid: 0,
    }
}

fn set(file: &File, kind: i32, bytes: (i64, i64)) -> io::Result<()> {
    command(file, libc::F_OFD_SETLK, &mut range(kind, bytes))
}

/// Whether somebody else has a lock of a byte, of whatever kind, but one for reading all of the file,
/// which readers of ours had that were started before there were ranges.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut found = range(libc::F_WRLCK, (byte, 1));
    command(file, libc::F_OFD_GETLK, &mut found)?;
    let reads_all = found.l_type == libc::F_RDLCK as i16 && found.l_start == 0 && found.l_len == 0;
    Ok(found.l_type != libc::F_UNLCK as i16 && !reads_all)
}

#[allow(unsafe_code, reason = "no safe wrapper offers locks of open file descriptions")]
fn command(file: &File, command: i32, range: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call, and the pointer is to a live structure of the kind
    // that both commands take.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *range) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
