//! virtio-blk: disks from raw files and block devices.
//!
//! `disk` opens and locks the file, `request` reads what the driver wants, `engine` does the I/O
//! (io_uring, or a few threads), `device` connects them.

pub mod device;
pub mod disk;
pub mod engine;
mod request;
#[cfg(test)]
mod stall;
#[cfg(test)]
mod tests;
