//! Limits of what is read and kept.

/// Bytes of a piece of a file. A file's last may be shorter.
pub const CHUNK_BYTES: u64 = 128 << 10;
/// How many of the last chunks may be referred to: 32 GiB of data that is not the same, for which a
/// reader remembers 12 MiB.
pub const WINDOW_CHUNKS: usize = 1 << 18;
/// Bytes a manifest may have.
pub const MANIFEST_BYTES_MAX: u32 = 1 << 20;
/// Most initial RAM disks or Multiboot modules.
pub const MODULES_MAX: usize = 16;
/// Bytes of the words that go with one.
pub const WORDS_BYTES_MAX: usize = 4096;
/// Most disks.
pub const DISKS_MAX: usize = 16;
/// Bytes of a kernel.
pub const KERNEL_BYTES_MAX: u64 = 1 << 30;
/// Bytes of an initial RAM disk or a module.
pub const MODULE_BYTES_MAX: u64 = 4 << 30;
/// Bytes of a disk.
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// Bytes of what processors and devices hold.
pub const STATE_BYTES_MAX: u64 = 4 << 20;
/// Bytes of memory.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;
/// Disks are in whole sectors.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of the description in an OVA.
pub const OVF_BYTES_MAX: u64 = 4 << 20;
/// Bytes of the list of checksums in an OVA.
pub const SUMS_BYTES_MAX: u64 = 1 << 20;
/// How deep elements of a description may be in each other.
pub const OVF_DEPTH_MAX: usize = 32;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(SECTOR_BYTES) && CHUNK_BYTES <= u32::MAX as u64);
