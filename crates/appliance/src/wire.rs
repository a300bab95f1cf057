//! Records, as both directions need them.
//!
//! ```text
//! magic 8 | version u32 | record ... | end
//! record: kind u8 | length of what follows u32 | ...
//! ```

use blake3::{Hash, Hasher};

use crate::error::ApplianceError;
use crate::limits::{CHUNK_BYTES, MANIFEST_BYTES_MAX};

/// No text begins like this, and a change of line ends would be seen.
pub(crate) const MAGIC: [u8; 8] = *b"\x89BERTH\r\n";
/// The version that is written, and the only one that is read.
pub(crate) const VERSION: u32 = 1;
/// Bytes of a record before what is in it.
pub(crate) const HEAD_BYTES: usize = 5;
/// Bytes of a checksum.
pub(crate) const HASH_BYTES: usize = 32;
const CHUNK_MAX: u32 = CHUNK_BYTES as u32 + HASH_BYTES as u32;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// JSON.
    Manifest = 1,
    /// A checksum and the bytes of a chunk.
    Plain = 2,
    /// A checksum and a chunk, compressed.
    Packed = 3,
    /// The number of a chunk that is to be here again.
    Same = 4,
    /// A number of bytes that are zero.
    Zero = 5,
    /// The number of chunks and the checksum of all.
    End = 6,
}

impl Kind {
    /// The head of a record, with a length that is possible.
    pub(crate) fn parse(head: [u8; HEAD_BYTES], at: u64) -> Result<(Self, usize), ApplianceError> {
        let [kind, len @ ..] = head;
        let len = u32::from_le_bytes(len);
        let (kind, least, most) = match kind {
            1 => (Self::Manifest, 1, MANIFEST_BYTES_MAX),
            2 => (Self::Plain, 33, CHUNK_MAX),
            3 => (Self::Packed, 33, CHUNK_MAX),
            4 => (Self::Same, 8, 8),
            5 => (Self::Zero, 8, 8),
            6 => (Self::End, 40, 40),
            _ => return Err(ApplianceError::Damaged { at, what: "a record of no known kind" }),
        };
        if !(least..=most).contains(&len) {
            return Err(ApplianceError::Damaged { at, what: "a record with an impossible length" });
        }
        Ok((kind, len as usize))
    }

    pub(crate) fn head(self, len: usize) -> [u8; HEAD_BYTES] {
        let [a, b, c, d] = (len as u32).to_le_bytes();
        [self as u8, a, b, c, d]
    }
}

/// What begins a stream.
pub(crate) fn opening(version: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    let (magic, number) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    number.copy_from_slice(&version.to_le_bytes());
    bytes
}

/// The checksum of all records so far: each goes in behind those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain(pub(crate) Hash);

impl Chain {
    pub(crate) fn new() -> Self {
        Self(blake3::hash(&opening(VERSION)))
    }

    pub(crate) fn add(&mut self, head: &[u8], body: &[u8]) {
        let mut hasher = Hasher::new();
        hasher.update(self.0.as_bytes()).update(head).update(body);
        self.0 = hasher.finalize();
    }
}
