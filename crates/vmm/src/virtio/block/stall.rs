//! A page of memory that whoever touches it waits for, so that a request can be made to take as long
//! as a test wants: the kernel waits in the middle of its system call, as it does for a slow disk.

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd};

/// The number of the interface (linux/userfaultfd.h).
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
/// Report pages that are not there.
const REGISTER_MISSING: u64 = 1;

/// A range of memory that is waited for until this is dropped.
pub(super) struct Stall {
    faults: File,
    address: u64,
    len: u64,
}

impl Stall {
    /// Empties whole pages of a shared mapping and makes whoever touches them wait.
    ///
    /// # Errors
    /// The kernel refuses: without privileges it does, unless `vm.unprivileged_userfaultfd` is set.
    pub fn new(address: *mut u8, len: usize) -> Result<Self, Error> {
        // Without O_NONBLOCK, poll answers at once that something is wrong.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: makes a descriptor; no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(Error::last_os_error)?;
        // SAFETY: the descriptor was made above and belongs to nobody else.
        let faults = unsafe { File::from_raw_fd(fd) };
        let stall = Self { faults, address: address as u64, len: len as u64 };
        stall.control(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        // SAFETY: the caller's range is a mapping of its own; the kernel checks it. What it held is
        // gone, which is asked for.
        if unsafe { libc::madvise(address.cast(), len, libc::MADV_REMOVE) } != 0 {
            return Err(Error::last_os_error());
        }
        stall.control(UFFDIO_REGISTER, &mut [stall.address, stall.len, REGISTER_MISSING, 0])?;
        Ok(stall)
    }

    /// Waits until someone waits for a page.
    pub fn wait(&self) {
        let mut poll =
            libc::pollfd { fd: self.faults.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live structure.
        let count = unsafe { libc::poll(&raw mut poll, 1, 20_000) };
        assert_eq!((count, poll.revents), (1, libc::POLLIN), "nobody touched the page");
    }

    fn control<const N: usize>(&self, what: u64, argument: &mut [u64; N]) -> Result<(), Error> {
        // SAFETY: each request's structure is N words (3 for API, 2 for a range, 4 to register).
        let result = unsafe { libc::ioctl(self.faults.as_raw_fd(), what, argument.as_mut_ptr()) };
        if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        // Lets whoever waits go on; closing the descriptor does, too.
        let _ = self.control(UFFDIO_UNREGISTER, &mut [self.address, self.len]);
    }
}
