//! Locks of disk files, so that no writable disk is opened twice.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::limits::{LOCK_RETRY, LOCK_WAIT};

/// Locks a whole file: shared for readers, else exclusive.
///
/// It is a lock of the open file description: it also excludes a second opening by the same process,
/// ends with the file, however the process ends, and is seen by QEMU, which locks single bytes.
///
/// A process that was killed a moment ago may still have it, so it is tried for [`LOCK_WAIT`].
///
/// # Errors
/// Somebody else has it.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let range = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let began = Instant::now();
    loop {
        match set(file, &range) {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < LOCK_WAIT =>
            {
                std::thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

#[allow(unsafe_code, reason = "no safe wrapper offers locks of open file descriptions")]
fn set(file: &File, range: &libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call, and the pointer is to a live structure that the
    // kernel only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const *range) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
