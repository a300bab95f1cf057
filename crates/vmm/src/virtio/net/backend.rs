//! Where frames come from and go to.

use std::io;
use std::os::fd::RawFd;

/// Bytes of the header before each frame in the guest's buffers.
pub const HEADER_SIZE: usize = 12;

/// The header: flags, segmentation, checksum offsets, number of buffers.
pub type Header = [u8; HEADER_SIZE];

/// The other end of the guest's cable. Nothing here waits.
pub trait Backend: Send + 'static {
    /// Readable when frames have arrived, writable when frames can go out again.
    fn fd(&self) -> RawFd;
    /// Features that only this backend makes possible: checksum and segmentation offload.
    fn features(&self) -> u64;
    /// The largest packet, if the guest is to be told.
    fn mtu(&self) -> Option<u16>;
    /// The driver chose these features.
    ///
    /// # Errors
    /// The backend cannot do so after all.
    fn negotiated(&mut self, features: u64) -> io::Result<()>;
    /// Takes a frame of `len` bytes, which `fill` writes to the place it is given; if `fill` fails,
    /// there is no frame. `false`: no room now, try again after [`Backend::flush`].
    ///
    /// # Errors
    /// The cable is cut.
    fn send(
        &mut self,
        header: &Header,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> io::Result<bool>;
    /// Moves on what was taken. `false`: some of it waits until the descriptor is writable.
    ///
    /// # Errors
    /// The cable is cut.
    fn flush(&mut self) -> io::Result<bool>;
    /// The next frame that has arrived; the same until [`Backend::consume`].
    ///
    /// # Errors
    /// The cable is cut.
    fn peek(&mut self) -> io::Result<Option<(Header, &[u8])>>;
    /// Drops the frame that `peek` returned.
    fn consume(&mut self);
}
