//! Tap interfaces: Ethernet frames of an interface of the host as reads and writes of a file.
//!
//! An interface is there as long as somebody has the file, and goes with the last: whoever it is handed to
//! cannot leave it behind, however he ends.
#![allow(unsafe_code, reason = "ioctl has no safe interface")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{NetError, Result};

const DEVICE: &str = "/dev/net/tun";

/// Makes an interface of that name and attaches to it. Before each frame there is a `virtio_net_hdr`,
/// whose size whoever reads it sets; reads and writes do not wait.
///
/// # Errors
/// [`NetError::Tap`]: there is one already, or this is not allowed.
pub(crate) fn make(name: &str) -> Result<OwnedFd> {
    let failed = |action| move |source| NetError::Tap { action, name: name.to_owned(), source };
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
    let file: File = opened.map_err(failed("opening /dev/net/tun"))?;
    // SAFETY: ifreq is plain data, for which zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(failed("naming")(io::ErrorKind::InvalidInput.into()));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which is live.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(failed("making")(io::Error::last_os_error()));
    }
    Ok(file.into())
}
