//! Disk formats: raw files and qcow2 images with their backing chains.
//!
//! `chain` opens and locks the files of a disk, `qcow2` reads and writes images, `layers` freezes what a
//! disk holds below a new overlay, `tools` is what `berth disk` does. Nothing here knows a machine; the block device of `vmm` calls it from its
//! worker threads, and nothing here starts one.
//!
//! A format is always given, never guessed from what a file holds: a guest could write the header
//! of an image into its raw disk, and name a file of the host in it.

#![deny(unsafe_code)]

pub mod chain;
pub mod error;
pub mod format;
pub mod layers;
pub mod limits;
pub mod lock;
pub mod qcow2;
pub mod storage;
pub mod tools;
