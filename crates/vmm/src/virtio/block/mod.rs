//! virtio-blk: disks from raw files, block devices and qcow2 images.
//!
//! `disk` opens and locks the file, `live` freezes it, `request` reads what the driver wants, `engine` does the I/O
//! (io_uring, or a few threads, which `qcow2` serves), `device` connects them.

pub mod device;
pub mod disk;
pub mod engine;
pub mod live;
mod qcow2;
mod request;
#[cfg(test)]
mod stall;
#[cfg(test)]
mod tests;
