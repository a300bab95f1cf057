//! Sizes that streams are held to.

/// Bytes of a path, as Linux has it.
pub const PATH_BYTES_MAX: usize = 4096;
/// Bytes of one name in it.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of the headers before the content of one file: long names, extensions.
pub const HEADERS_BYTES_MAX: u64 = 1 << 20;
/// Files with several names that are known again; others are sent once for each name.
pub const LINKS_MAX: usize = 1 << 20;
/// Bytes of a file that are moved at once.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Zeroes in pieces of so many bytes take no space where they arrive.
pub const HOLE_BYTES: usize = 4096;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(HOLE_BYTES));
