//! System calls for which there is no safe wrapper: transfers between files and guest memory, and
//! acting as another user.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::memory::Memory;
use crate::virtio::chain::{Chain, Direction};
use crate::virtio::fs::wire::User;

/// iovecs of one call; the system takes no more.
const PIECES_MAX: usize = 1024;

fn pieces(
    memory: &Memory,
    chain: &Chain,
    direction: Direction,
    (offset, len): (u64, u64),
) -> Result<Vec<libc::iovec>, Errno> {
    let mut list = Vec::new();
    let found = chain.host_buffers(memory, direction, offset, len, &mut list);
    found.map(|()| list).map_err(|_| Errno::INVAL)
}

/// Drops what a call has moved.
fn advance(list: &mut Vec<libc::iovec>, count: usize) {
    let mut left = count;
    list.retain_mut(|piece| {
        let part = left.min(piece.iov_len);
        left -= part;
        piece.iov_len -= part;
        // Inside the piece, or its end: never used when nothing is left of it.
        piece.iov_base = piece.iov_base.wrapping_byte_add(part);
        piece.iov_len > 0
    });
}

/// Calls until all is moved, the file ends, or the system refuses; then what was moved before counts if
/// `part` is of use: a guest takes an answer to a read that is too short for the end of the file.
fn repeat(
    mut list: Vec<libc::iovec>,
    offset: u64,
    part: bool,
    mut call: impl FnMut(&[libc::iovec], i64) -> isize,
) -> Result<u64, Errno> {
    let mut done = 0;
    while !list.is_empty() {
        let at = offset.checked_add(done).and_then(|at| i64::try_from(at).ok());
        let at = at.ok_or(Errno::INVAL)?;
        let next = list.get(..list.len().min(PIECES_MAX)).unwrap_or_default();
        match usize::try_from(call(next, at)) {
            Ok(0) => break,
            Ok(count) => {
                done += count as u64;
                advance(&mut list, count);
            }
            Err(_) => match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                _ if done > 0 && part => break,
                code => return Err(Errno::from_raw_os_error(code.unwrap_or(libc::EIO))),
            },
        }
    }
    Ok(done)
}

/// Reads a file from `offset` into `len` writable bytes of a chain from `start`; gives how many there
/// were.
pub(super) fn read(
    file: impl AsFd,
    offset: u64,
    (memory, chain): (&Memory, &Chain),
    start: u64,
    len: u64,
) -> Result<u64, Errno> {
    let list = pieces(memory, chain, Direction::Writable, (start, len))?;
    let fd = file.as_fd().as_raw_fd();
    let read = repeat(list, offset, false, |list, at| {
        // SAFETY: the pieces are guest RAM, which `memory` keeps mapped and which others may change
        // at any time; the system checks everything else.
        unsafe { libc::preadv(fd, list.as_ptr(), list.len() as i32, at) }
    });
    // Before the chain is given back; also after an error, which may have come late.
    chain.mark_written(memory, start, len).map_err(|_| Errno::INVAL)?;
    read
}

/// Writes `len` readable bytes of a chain from `start` to a file, at `offset` or at its end; gives how
/// many.
pub(super) fn write(
    file: impl AsFd,
    offset: u64,
    append: bool,
    (memory, chain): (&Memory, &Chain),
    start: u64,
    len: u64,
) -> Result<u64, Errno> {
    let list = pieces(memory, chain, Direction::Readable, (start, len))?;
    let fd = file.as_fd().as_raw_fd();
    let flags = if append { libc::RWF_APPEND } else { 0 };
    repeat(list, offset, true, |list, at| {
        // SAFETY: as above; the system only reads the pieces.
        unsafe { libc::pwritev2(fd, list.as_ptr(), list.len() as i32, at, flags) }
    })
}

/// Gives this thread a umask of its own, which takes nothing away: the guest has applied its own.
pub(super) fn own_umask() -> Result<(), Errno> {
    // SAFETY: only the umask, the working directory and the root stop being shared; neither memory
    // nor descriptors do.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(())
}

/// While it lives, this thread's accesses to files are another user's, who may pass all permissions of
/// files: the guest's kernel has checked them, with groups that are not known here.
pub(super) struct ActingAs(());

impl ActingAs {
    /// Becomes that user; nobody else is needed for root, and nobody else is possible for others.
    pub fn user(user: User) -> Result<Option<Self>, Errno> {
        if user == (User { uid: 0, gid: 0 }) || !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let acting = Self(());
        set_ids(user);
        if ids() != user {
            // A number that this process' user namespace does not have.
            return Err(Errno::OVERFLOW);
        }
        if user.uid != 0 {
            let mut sets = rustix::thread::capabilities(None)?;
            if sets.permitted.contains(CapabilitySet::DAC_OVERRIDE) {
                sets.effective |= CapabilitySet::DAC_OVERRIDE;
                rustix::thread::set_capabilities(None, sets)?;
            }
        }
        Ok(Some(acting))
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // The kernel gives what it took away for files back with user 0 (capabilities(7)).
        set_ids(User { uid: 0, gid: 0 });
    }
}

/// Changes this thread only, as the system call does (credentials(7)); the C library adds nothing.
fn set_ids(user: User) {
    // SAFETY: no memory is involved. Group first: changing it takes a capability that user 0 has.
    unsafe {
        libc::setfsgid(user.gid);
        libc::setfsuid(user.uid);
    }
}

/// Who this thread acts as.
fn ids() -> User {
    // SAFETY: no memory is involved; a number that cannot be changes nothing.
    let (uid, gid) = unsafe { (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX)) };
    User { uid: uid.cast_unsigned(), gid: gid.cast_unsigned() }
}

/// A user that changes nothing.
pub(super) fn owner(uid: Option<u32>, gid: Option<u32>) -> (Option<Uid>, Option<Gid>) {
    let uid = uid.filter(|uid| *uid != u32::MAX).map(Uid::from_raw);
    (uid, gid.filter(|gid| *gid != u32::MAX).map(Gid::from_raw))
}
