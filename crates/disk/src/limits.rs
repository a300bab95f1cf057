//! Named limits of disk formats.

use std::time::Duration;

/// Files of one disk: an overlay and what is below it. Each snapshot adds one.
pub const CHAIN_LAYERS_MAX: usize = 64;
/// Bytes of a backing file's name in a header.
pub const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// Bytes of the table of tables of mappings.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Bytes of the table of blocks of reference counts.
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// Bytes of tables of mappings that are kept in memory for one image.
pub const TABLES_BYTES_MAX: u64 = 16 << 20;
/// Bytes of blocks of reference counts that are kept in memory for one image.
pub const BLOCKS_BYTES_MAX: u64 = 8 << 20;
/// Tables or blocks that are kept however large they are.
pub const CACHED_MIN: usize = 4;
/// Clusters that wait for being given back before the tables are written out without a flush.
pub const FREED_MAX: usize = 65_536;
/// Blocks of reference counts that are looked through for one free cluster.
pub const SCAN_BLOCKS_MAX: usize = 64;
/// Clusters of a file that can be checked: a byte of memory each.
pub const CHECK_CLUSTERS_MAX: u64 = 1 << 28;
/// Tables of mappings that a check looks into.
pub const CHECK_TABLES_MAX: u64 = 1 << 20;
/// Findings of a check that are told one by one.
pub const CHECK_FINDINGS_MAX: usize = 20;
/// Internal snapshots of an image that is checked or shown.
pub const SNAPSHOTS_MAX: u32 = 65_536;
/// Bytes converted at a time.
pub const CONVERT_BYTES: usize = 1 << 20;
/// Least and most bits of a cluster's size.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// How long a lock that somebody has is waited for.
pub const LOCK_WAIT: Duration = Duration::from_millis(500);
/// How often it is tried meanwhile.
pub const LOCK_RETRY: Duration = Duration::from_millis(10);

const _: () = assert!(CONVERT_BYTES.is_multiple_of(1 << 16));
