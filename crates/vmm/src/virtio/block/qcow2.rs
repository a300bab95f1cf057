//! Jobs on a qcow2 image, done on a thread of the engine.
//!
//! Bytes go through a buffer of the host: an image is read in pieces, and some of them are made.

use std::io;

use berth_disk::qcow2::image::Image;

use crate::virtio::block::engine::{Buffers, Job};
use crate::virtio::block::live::LiveImage;
use crate::virtio::limits::BLOCK_BOUNCE_BYTES;

/// Does a job; the result is like that of a system call, or minus the error number.
pub(super) fn execute(live: &LiveImage, job: &Job) -> i64 {
    let result = match job {
        Job::Read { buffers, offset } => live.with(|image| read(image, buffers, *offset)),
        Job::Write { buffers, offset, durable } => {
            let written = live.with(|image| write(image, buffers, *offset));
            match written {
                Ok(_) if *durable => live.flush().and(written),
                other => other,
            }
        }
        Job::Flush => live.flush().map(|()| 0),
        Job::Discard { offset, len } => live.with(|image| image.discard(*offset, *len)).map(|()| 0),
        Job::Zero { offset, len, unmap } => {
            live.with(|image| image.write_zeroes(*offset, *len, *unmap)).map(|()| 0)
        }
    };
    result.unwrap_or_else(|error| {
        tracing::debug!(%error, "a request to an image failed");
        let number = error.raw_os_error().filter(|number| *number != libc::EAGAIN);
        -i64::from(number.unwrap_or(match error.kind() {
            io::ErrorKind::StorageFull => libc::ENOSPC,
            _ => libc::EIO,
        }))
    })
}

fn read(image: &Image, buffers: &Buffers, offset: u64) -> io::Result<i64> {
    let total = buffers.len();
    let mut bounce = vec![0; total.min(BLOCK_BOUNCE_BYTES)];
    // Bytes of the request before what is in the bounce buffer, up to its end, and given to the guest.
    let (mut begin, mut end, mut given) = (0, 0, 0);
    for (address, len) in pieces(buffers, 4096) {
        if given + len > end {
            begin = given;
            end = total.min(begin + bounce.len());
            let part = bounce.get_mut(..end - begin).unwrap_or_default();
            image.read(offset + begin as u64, part)?;
        }
        let part = bounce.get(given - begin..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        // SAFETY: the piece is within a buffer of the job, which is guest memory that the engine keeps
        // mapped; the bounce buffer is elsewhere. The guest may write there at the same time; nothing
        // here depends on what it finds.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), address, part.len()) };
        given += len;
    }
    Ok(given as i64)
}

fn write(image: &Image, buffers: &Buffers, offset: u64) -> io::Result<i64> {
    // In one piece, as far as it goes: a cluster that is written whole need not be read.
    let mut bounce = Vec::with_capacity(buffers.len().min(BLOCK_BOUNCE_BYTES));
    let mut at = offset;
    for (address, len) in pieces(buffers, BLOCK_BOUNCE_BYTES) {
        if bounce.len() + len > BLOCK_BOUNCE_BYTES {
            image.write(at, &bounce)?;
            at += bounce.len() as u64;
            bounce.clear();
        }
        let old = bounce.len();
        bounce.resize(old + len, 0);
        let part = bounce.get_mut(old..).unwrap_or_default();
        // SAFETY: as in `read`, the other way round; zeroes come from memory that never goes away.
        unsafe {
            std::ptr::copy_nonoverlapping(address.cast_const(), part.as_mut_ptr(), part.len())
        };
    }
    image.write(at, &bounce)?;
    at += bounce.len() as u64;
    Ok((at - offset) as i64)
}

/// The buffers, cut where they are longer than `max`.
fn pieces(buffers: &Buffers, max: usize) -> impl Iterator<Item = (*mut u8, usize)> {
    let max = max.max(1);
    buffers.0.iter().flat_map(move |buffer| {
        (0..buffer.iov_len).step_by(max).map(move |at| {
            let address = buffer.iov_base.wrapping_byte_add(at).cast::<u8>();
            (address, (buffer.iov_len - at).min(max))
        })
    })
}
