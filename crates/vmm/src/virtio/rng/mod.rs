//! virtio-rng: random bytes from the host's kernel.

pub mod device;
#[cfg(test)]
mod tests;

use std::io;

/// Fills a buffer with random bytes of the kernel.
///
/// # Errors
/// The kernel refuses.
pub fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    let mut rest = buffer;
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of a live, writable slice.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => rest = std::mem::take(&mut rest).get_mut(count..).unwrap_or(&mut []),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
